"""A grid of L1 SAEs by dictionary_learning's trainSAE, in its environment: python run_dictionary_learning_sweep.py JOB

A run for each hook, as its demo makes them, the SAEs of a hook beside each other on one stream. The stream is ours: its
own buffer needs nnsight 0.3, which knows neither this PyTorch nor this transformers. It runs the model to the hook and
stops there, once for each epoch, and shuffles 8 batches at a time; the norm is taken of 8 batches (100). Answers with
the seconds of the model's passes.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

for name, attribute in (("nnsight", "LanguageModel"), ("wandb", "init")):
    stub = ModuleType(name)
    setattr(stub, attribute, object)
    sys.modules[name] = stub

from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402

WINDOWS = 32
"""Of a forward pass."""
BUFFERED = 8
"""Batches that are shuffled together."""


class Stop(Exception):
    """The hook has fired."""


class Stream:
    """Shuffled batches [batch_size, d_in] float32 of one hook."""

    def __init__(self, job: dict[str, Any], hook: str) -> None:
        self.job, self.seconds, self.scaling = job, 0.0, True
        dtype = getattr(torch, job["precision"])
        self.model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
        self.model.get_submodule(hook).register_forward_hook(self._keep)
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        lines = Path(job["text"]).read_text().splitlines()
        texts = (json.loads(line)[job["text_field"]] for line in lines)
        ids: list[int] = []
        for text in texts:
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= job["tokens"]:
                break
        size = job["context_size"]
        self.windows = torch.tensor(ids[: job["tokens"] // size * size]).view(-1, size)
        self.found = torch.empty(0)

    def _keep(self, _module: object, _inputs: object, output: Tensor) -> None:
        self.found = output
        raise Stop

    @torch.no_grad()
    def _rows(self, windows: Tensor) -> Tensor:
        began = time.perf_counter()
        with contextlib.suppress(Stop):
            self.model(windows, use_cache=False)
        self.seconds += time.perf_counter() - began
        return self.found.flatten(0, 1).float()

    def __iter__(self) -> Iterator[Tensor]:
        size = self.job["batch_size"]
        rows, given = torch.empty(0, self.job["d_in"]), 0
        for _epoch in range(self.job["epochs"]):
            for windows in self.windows[torch.randperm(len(self.windows))].split(WINDOWS):
                rows = torch.cat([rows, self._rows(windows)])
                if len(rows) >= BUFFERED * size:
                    rows = rows[torch.randperm(len(rows))]
                    kept = len(rows) // 2
                    while len(rows) - size >= kept:
                        yield rows[:size]
                        rows, given = rows[size:], given + 1
                        if self.scaling and given == BUFFERED:
                            self.scaling = False
                            return
        while len(rows) >= size:
            yield rows[:size]
            rows = rows[size:]


def train(job: dict[str, Any], hook: str, steps: int) -> float:
    """The SAEs of one hook; returns the seconds of the model's passes."""
    stream, warmup = Stream(job, hook), max(1, steps // 20)
    configs = [
        {
            "trainer": StandardTrainerAprilUpdate, "steps": steps, "activation_dim": job["d_in"],
            "dict_size": job["d_sae"], "layer": 0, "lm_name": "bench", "lr": job["lr"], "warmup_steps": warmup,
            "decay_start": round(0.8 * steps), "l1_penalty": l1, "sparsity_warmup_steps": warmup, "seed": 0,
            "device": "cpu",
        }
        for l1 in job["l1"]
    ]  # fmt: skip
    folder = Path(job["out"]) / f"run-{hook}"
    trainSAE(stream, configs, steps, save_dir=str(folder), normalize_activations=True, device="cpu")
    for number, l1 in enumerate(job["l1"]):
        state = torch.load(folder / f"trainer_{number}" / "ae.pt", weights_only=True)
        out = Path(job["out"]) / f"{hook}.l1-{l1:g}"
        out.mkdir()
        weights = {
            "W_enc": state["encoder.weight"].T.contiguous(),
            "b_enc": state["encoder.bias"],
            "W_dec": state["decoder.weight"].T.contiguous(),
            "b_dec": state["bias"],
        }
        save_file(weights, out / "sae_weights.safetensors")
        cfg = {"architecture": "standard", "d_in": job["d_in"], "d_sae": job["d_sae"], "apply_b_dec_to_input": True}
        (out / "cfg.json").write_text(json.dumps(cfg))
    return stream.seconds


def main() -> None:
    began = time.perf_counter()
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    steps = job["tokens"] * job["epochs"] // job["batch_size"]
    passes = sum(train(job, hook, steps) for hook in job["hooks"])
    names = [f"{hook}.l1-{l1:g}" for hook in job["hooks"] for l1 in job["l1"]]
    told = {"seconds": time.perf_counter() - began, "model_seconds": passes, "steps": steps, "saes": names}
    (Path(job["out"]) / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
