"""Our own trainer on a grid of jobs, those of one seed as one pack: python run_ours_packs.py JOBS.json

Writes nothing but `done`: what it costs is asked for, not what it makes.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

import torch
from run_ours import RowSource
from runner import Batches, Job

from midiscover.config import TrainConfig
from midiscover.saeconfig import StandardConfig
from midiscover.train import Member, train
from tests.workers import SilentWorker


def main() -> None:
    jobs = [Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    torch.set_num_threads(jobs[0].threads)
    source = RowSource(Batches(jobs[0]))
    worker = SilentWorker()
    worker.device = torch.device(jobs[0].device)
    for _, pack in groupby(jobs, lambda job: job.seed):
        members = [
            Member(
                id=job.name,
                config=StandardConfig(l1_coefficient=job.sparsity),
                train=TrainConfig(
                    batch_size=job.batch_size,
                    seed=job.seed,
                    dtype="bfloat16" if job.precision == "bfloat16" else "float32",
                    checkpoint_every=1e9,
                    report_every=50,
                ),
                d_sae=job.d_sae,
            )
            for job in pack
        ]
        train(members, source, worker)
    (Path(jobs[0].out) / "done").touch()


if __name__ == "__main__":
    main()
