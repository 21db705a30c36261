"""dictionary_learning's trainers in its own `trainSAE`, with its demo's settings. Runs in its own environment.

Inputs of unit mean squared norm, decay over the last fifth; its warm-ups, 1,000 steps of the learning rate and 5,000
of the penalty, do not fit into a short run and take the first twentieth. TopK's AuxK loss counts a feature as dead
after 10M tokens, which a short run never reaches: here it is the fiftieth of the run that it is in the demo.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from runner import Batches, Job, Made, main, measured
from torch import Tensor

# Imported for its harvest and its logging, neither of which is used here.
for name, attribute in (("nnsight", "LanguageModel"), ("wandb", "init")):
    stub = ModuleType(name)
    setattr(stub, attribute, object)
    sys.modules[name] = stub

from dictionary_learning.dictionary import AutoEncoder  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402


class ScaledTopKTrainer(TopKTrainer):
    """TopKTrainer with a dead window that the run can reach."""

    tokens = 0

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.dead_feature_threshold = self.tokens // 50


TRAINERS = {
    "StandardTrainer": StandardTrainer,
    "AprilUpdate": StandardTrainerAprilUpdate,
    "demo": ScaledTopKTrainer,
    "step": TopKTrainer,  # where only a step's time is asked for: no feature is dead so soon
}


def train(job: Job, batches: Batches, held_out: Tensor) -> Made:
    ScaledTopKTrainer.tokens = job.steps * job.batch_size
    d_in, warmup = held_out.shape[1], max(1, job.steps // 20)
    config = {
        "trainer": TRAINERS[job.variant],
        "steps": job.steps,
        "activation_dim": d_in,
        "dict_size": job.d_sae,
        "layer": 0,
        "lm_name": "bench",
        "lr": job.lr,
        "warmup_steps": warmup,
        "decay_start": round(0.8 * job.steps),
        "seed": job.seed,
        "device": job.device,
    }
    if job.kind == "standard":
        config |= {"l1_penalty": job.sparsity, "sparsity_warmup_steps": warmup}
    else:
        config |= {"k": round(job.sparsity)}
    with tempfile.TemporaryDirectory() as folder:
        # On a CPU its trainSAE has no autocast, and would give bfloat16 rows to float32 weights.
        precision = getattr(torch, job.precision) if job.device != "cpu" else torch.float32
        trainSAE(
            batches, [config], job.steps,
            save_dir=folder if job.keep else None, normalize_activations=True,
            device=job.device, autocast_dtype=precision,
        )  # fmt: skip
        if not job.keep:
            return Made.nothing()
        state = torch.load(Path(folder) / "trainer_0" / "ae.pt", weights_only=True, map_location=job.device)
    if job.kind == "standard":
        ae, bias, cfg = AutoEncoder(d_in, job.d_sae), "bias", {"architecture": "standard"}
    else:
        k = round(job.sparsity)
        ae, bias, cfg = AutoEncoderTopK(d_in, job.d_sae, k), "b_dec", {"architecture": "topk", "k": k}
    ae.load_state_dict(state)
    ae.to(job.device)
    weights = {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["encoder.bias"],
        "W_dec": state["decoder.weight"].T,
        "b_dec": state[bias],
    }
    return Made(cfg, weights, measured(ae.encode, ae.decode, held_out))


if __name__ == "__main__":
    main(train)
