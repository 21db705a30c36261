"""sparsify's TopK SAE in its own Trainer, with its default optimiser. Runs in sparsify's environment.

Signum with schedule-free averaging, no warm-up, no decay, the loss is FVU, no AuxK: all its defaults. Its Trainer
trains inside a forward pass of a language model; `Replay` stands in for one and gives out the rows whose numbers it
is fed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from runner import Batches, Job, Made, main, measured
from torch import Tensor, nn

if not torch.cuda.is_available():
    torch.cuda.is_bf16_supported = lambda *_: False  # read where their class is defined; raises without CUDA

from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer

HOOK = "hook"
SEQUENCE = 128


class Replay(nn.Module):
    """A 'language model' whose token ids are row numbers and whose one module gives those rows."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.rows, self.stamps = batches.rows, batches.stamps
        self.hook = nn.Identity()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.config = SimpleNamespace(num_hidden_layers=1)

    @property
    def base_model(self) -> Replay:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """Activations [sequences, tokens, d_in] of row numbers [sequences, tokens]."""
        self.stamps.append(time.perf_counter())
        return self.hook(self.rows[input_ids].float())


def train(job: Job, batches: Batches, held_out: Tensor) -> Made:
    k, sequence = round(job.sparsity), min(SEQUENCE, job.batch_size)
    numbers = torch.arange(len(batches.rows)).view(-1, sequence)
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            SaeConfig(num_latents=job.d_sae, k=k),
            batch_size=job.batch_size // sequence,
            lr=job.lr,
            hookpoints=[HOOK],
            init_seeds=[job.seed],
            log_to_wandb=False,
            save_dir=folder,
            run_name="run",
        )
        Trainer(cfg, [{"input_ids": ids} for ids in numbers], Replay(batches)).fit()
        sae = SparseCoder.load_from_disk(Path(folder) / "run" / HOOK)
    weights = {
        "W_enc": sae.encoder.weight.T,
        "b_enc": sae.encoder.bias,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }

    def encode(x: Tensor) -> Tensor:
        top = sae.encode(x)
        return torch.zeros_like(top.pre_acts).scatter(-1, top.top_indices, top.top_acts)

    def decode(features: Tensor) -> Tensor:
        top = features.topk(k, dim=-1)
        return sae.decode(top.values, top.indices)

    return Made({"architecture": "topk", "k": k}, weights, measured(encode, decode, held_out))


if __name__ == "__main__":
    main(train)
