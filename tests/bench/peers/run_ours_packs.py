"""Our own trainer on a grid of jobs, those of one seed as one pack: python run_ours_packs.py JOBS.json

Writes a file of seconds for the first job of each pack, as the others do for each job: what it costs is asked for, not
what it makes.
"""

from __future__ import annotations

import json
import sys
import time
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
    batches = Batches(jobs[0])
    source = RowSource(batches)
    worker = SilentWorker()
    worker.device = torch.device(jobs[0].device)
    for _, jobs_of_pack in groupby(jobs, lambda job: job.seed):
        pack = list(jobs_of_pack)
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
        began = time.perf_counter()
        train(members, source, worker)
        if worker.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = {"seconds": time.perf_counter() - began, "seconds_a_step": batches.seconds_a_step()}
        (Path(pack[0].out) / f"{pack[0].name}.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
