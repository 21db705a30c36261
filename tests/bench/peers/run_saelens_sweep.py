"""A grid of L1 SAEs by SAELens' own runners, model and all, in its environment: python run_saelens_sweep.py JOB.json

`multi`: all SAEs in one MultiSAETrainingRunner; `single`: one run, of the first hook and coefficient. Settings are
those of run_saelens.py, SAELens' tutorial; what would only cost it time is smaller than its defaults: 32 batches for
the norm (1,000), a buffer of 8 batches (20), no logging. Answers with the seconds of the run and of the model's passes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import StandardTrainingSAEConfig
from sae_lens.config import LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig


def main() -> None:
    began = time.perf_counter()
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    steps = job["tokens"] * job["epochs"] // job["batch_size"]
    grid = [(hook, l1) for hook in job["hooks"] for l1 in job["l1"]]
    grid = grid[:1] if job["way"] == "single" else grid
    names = {f"{hook}.l1-{l1:g}": (hook, l1) for hook, l1 in grid}
    common = {"d_in": job["d_in"], "d_sae": job["d_sae"], "normalize_activations": "expected_average_only_in"}
    config = MultiSAETrainingRunnerConfig(
        saes={
            name: StandardTrainingSAEConfig(**common, l1_coefficient=l1, l1_warm_up_steps=steps // 20)
            for name, (_, l1) in names.items()
        },
        hook_names={name: hook for name, (hook, _) in names.items()},
        model_name=job["model"],
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"torch_dtype": job["precision"]},
        autocast=job["precision"] == "bfloat16",
        context_size=job["context_size"],
        training_tokens=steps * job["batch_size"],
        train_batch_size_tokens=job["batch_size"],
        n_batches_in_buffer=8,
        n_batches_for_norm_estimate=32,
        lr=job["lr"],
        lr_decay_steps=steps // 5,
        logger=LoggingConfig(log_to_wandb=False),
        output_path=None,
        checkpoint_path=None,
    )
    text = [json.loads(line)[job["text_field"]] for line in Path(job["text"]).read_text().splitlines()]
    runner = MultiSAETrainingRunner(config, override_dataset=Dataset.from_list([{"text": one} for one in text]))
    passes = 0.0
    plain = runner.model.run_with_cache

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        start = time.perf_counter()
        result = plain(*args, **kwargs)
        passes += time.perf_counter() - start
        return result

    runner.model.run_with_cache = timed
    saes = runner.run()
    for name, sae in saes.items():
        sae.save_inference_model(str(Path(job["out"]) / name))
    told = {"seconds": time.perf_counter() - began, "model_seconds": passes, "steps": steps, "saes": list(names)}
    (Path(job["out"]) / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
