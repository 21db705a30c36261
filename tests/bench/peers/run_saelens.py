"""SAELens' training SAEs in its own SAETrainer, with its tutorial's settings. Runs in SAELens' environment.

Inputs scaled to a mean norm of sqrt(d_in) (`expected_average_only_in`), no learning-rate warm-up, decay over the last
fifth, L1 warm-up over the first twentieth, decoder rows starting at norm 0.1. The AuxK loss of TopK counts a feature
as dead after 1,000 steps, which a short run never reaches: here it is the thirtieth of the run that it is in the
tutorial, but where only a step's time is asked for (variant `step`). A compiled job wraps the training pass as
SAELens' runner does with `compile_sae` and the mode that it calls best.
"""

from __future__ import annotations

import tempfile
from itertools import chain, islice

from runner import Batches, Job, Made, main
from sae_lens import (
    SAE,
    SAETrainer,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor, compile, no_grad

NORM_BATCHES = 100


def train(job: Job, batches: Batches, held_out: Tensor) -> Made:
    common = {"d_in": held_out.shape[1], "d_sae": job.d_sae, "normalize_activations": "expected_average_only_in"}
    common |= {"device": job.device}
    if job.kind == "standard":
        warmup = job.steps // 20
        sae = StandardTrainingSAE(
            StandardTrainingSAEConfig(**common, l1_coefficient=job.sparsity, l1_warm_up_steps=warmup)
        )
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=round(job.sparsity)))
    if job.compiled:
        sae.training_forward_pass = compile(sae.training_forward_pass, mode="max-autotune")
    cfg = SAETrainerConfig(
        total_training_samples=job.steps * job.batch_size,
        train_batch_size_samples=job.batch_size,
        lr=job.lr,
        lr_end=job.lr / 10,  # as their runner sets it; the constant schedule does not read it
        lr_decay_steps=job.steps // 5,
        dead_feature_window=1000 if job.variant == "step" else max(1, job.steps // 30),
        n_batches_for_norm_estimate=min(NORM_BATCHES, job.steps),
        device=job.device,
        autocast=job.precision == "bfloat16",
        logger=LoggingConfig(log_to_wandb=False),
    )
    # The norm is estimated on batches that their loop takes from the stream; training then begins at the first.
    trainer = SAETrainer(cfg, sae, chain(islice(batches, cfg.n_batches_for_norm_estimate), batches))
    trainer.fit()
    if not job.keep:
        return Made.nothing()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder, device=job.device)
    weights = {name: value.detach().clone() for name, value in saved.state_dict().items()}
    cfg_fields = {"architecture": saved.cfg.architecture(), "k": getattr(saved.cfg, "k", None)}
    return Made(cfg_fields, weights, own_numbers(trainer, saved, held_out))


@no_grad()
def own_numbers(trainer: SAETrainer, sae: SAE, rows: Tensor) -> dict[str, float]:
    """L0 and explained variance as SAELens logs them, of the SAE as it is loaded from its folder."""
    features = sae.encode(rows)
    output = TrainStepOutput(
        sae_in=rows,
        sae_out=sae.decode(features),
        feature_acts=features,
        hidden_pre=features,
        loss=rows.new_zeros(()),
        losses={},
        metrics={},
    )
    log = trainer.build_train_step_log_dict(output, n_training_samples=0)
    return {"l0": float(log["metrics/l0"]), "fvu": 1 - float(log["metrics/explained_variance"])}


if __name__ == "__main__":
    main(train)
