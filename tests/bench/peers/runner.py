"""What the runners of all sides share: jobs are read, the same batches handed out, folded weights written.

    python run_SIDE.py JOBS.json

Runs in a peer's own environment and knows nothing of miDiscover. JOBS.json is a list of jobs (`Job`). Each is
answered by NAME.safetensors (W_enc, b_enc, W_dec, b_dec of raw inputs, float32) and, last, by NAME.json; one that is
not to be kept by the latter alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROWS_PER_BATCH = 4096


class Job(NamedTuple):
    """One training."""

    name: str
    kind: str
    variant: str
    """Which of a peer's trainers or settings, where it documents several."""
    lr: float
    sparsity: float
    """k, or the L1 coefficient in the side's own convention."""
    seed: int
    steps: int
    batch_size: int
    d_sae: int
    threads: int
    rows: str
    """Folder of train.safetensors and held_out.safetensors, each with `rows` [rows, d_in] bfloat16."""
    out: str
    device: str = "cpu"
    precision: str = "float32"
    """Of the matrix products; with `bfloat16` each side's own way to it."""
    keep: bool = True
    """Whether the weights are written and measured; else only what the training cost is told."""
    compiled: bool = False
    """Whether a peer's training pass is compiled, where it has a setting for that."""


class Batches:
    """The training rows in their order; every pass begins anew, every batch is a new float32 tensor.

    `stamps` says when each batch of the last pass was asked for.
    """

    def __init__(self, job: Job) -> None:
        self.rows = load_file(Path(job.rows) / "train.safetensors")["rows"].to(job.device)
        self.size, self.steps = job.batch_size, job.steps
        self.stamps: list[float] = []
        assert len(self.rows) == self.size * self.steps, "one file holds exactly the batches of a training"

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        self.stamps = []
        for step in range(self.steps):
            # A GPU is at work on what it was asked before; only the first and the last measured step wait for it.
            if self.rows.is_cuda and step in (self.steps // 4, self.steps - 1):
                torch.cuda.synchronize()
            self.stamps.append(time.perf_counter())
            yield self.rows[step * self.size : (step + 1) * self.size].float()

    def seconds_a_step(self) -> float:
        """Over the last three quarters of a training: the median, or on a GPU the mean."""
        measured = self.stamps[len(self.stamps) // 4 :]
        if self.rows.is_cuda:
            return (measured[-1] - measured[0]) / (len(measured) - 1)
        return statistics.median(end - begin for begin, end in pairwise(measured))


class Made(NamedTuple):
    """A trained SAE of raw inputs."""

    cfg: dict[str, Any]
    """`architecture` and what else SAELens' cfg.json says of it."""
    weights: dict[str, Tensor]
    numbers: dict[str, float]
    """L0 and FVU of the held-out rows (FVU about their own mean), as the peer's own code gives them."""

    @classmethod
    def nothing(cls) -> Made:
        """Of a job that is not to be kept."""
        return cls({}, {}, {})


def measured(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], rows: Tensor) -> dict[str, float]:
    """L0 and FVU about the rows' own mean, with a peer's encode and decode; rows [rows, d_in] float32."""
    mean = rows.double().mean(0)
    active = residual = total = 0.0
    with torch.no_grad():
        for x in rows.split(ROWS_PER_BATCH):
            features = encode(x)
            active += float((features != 0).sum())
            residual += float((decode(features).double() - x.double()).pow(2).sum())
            total += float((x.double() - mean).pow(2).sum())
    return {"l0": active / len(rows), "fvu": residual / total}


def main(train: Callable[[Job, Batches, Tensor], Made]) -> None:
    """Answer the jobs of the file that the command line names; `train` also gets the held-out rows, float32."""
    jobs = [Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    torch.set_num_threads(jobs[0].threads)
    batches = Batches(jobs[0])
    held_out = load_file(Path(jobs[0].rows) / "held_out.safetensors")["rows"].float().to(jobs[0].device)
    for job in jobs:
        torch.manual_seed(job.seed)
        began, cpu = time.perf_counter(), time.process_time()
        made = train(job, batches, held_out)
        if job.device != "cpu":
            torch.cuda.synchronize()
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        seconds["seconds_a_step"] = batches.seconds_a_step()
        path = Path(job.out) / job.name
        if job.keep:
            weights = {name: value.detach().float().contiguous() for name, value in made.weights.items()}
            save_file(weights, f"{path}.safetensors")
        Path(f"{path}.json").write_text(json.dumps({"cfg": made.cfg, "own": made.numbers, **seconds}))
