"""Our own trainer on the rows that the peers get, with the recipe's settings. Runs in miDiscover's environment."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from runner import Batches, Job, Made, main, measured
from torch import Tensor

import midiscover.sae.code
import midiscover.sae.pattern
from midiscover.config import TrainConfig
from midiscover.sae.base import Normalisation
from midiscover.sae.registry import ARCHITECTURES, folded_sae
from midiscover.saeconfig import SAE_KINDS, TopKConfig
from midiscover.train import Member, Trained
from midiscover.train import train as train_members
from tests.workers import SilentWorker


@cache
def normalisation(batches: Batches) -> Normalisation:
    """Of the training rows; a harvest's manifest holds it, so that it is not part of a training."""
    count, d_in = batches.rows.shape
    mean = sum((batch.double().sum(0) for batch in batches), torch.zeros(d_in, device=batches.rows.device)) / count
    norms = squares = 0.0
    for batch in batches:
        squared = (batch.double() - mean).pow(2).sum(1)
        norms, squares = norms + float(squared.sqrt().sum()), squares + float(squared.sum())
    return Normalisation(mean.float(), math.sqrt(d_in) * count / norms, squares / count)


class RowSource:
    """The batches as the training loop's source."""

    def __init__(self, batches: Batches) -> None:
        self.inputs = self.outputs = normalisation(batches)
        self.rows_per_epoch, self.batch_size, self.rows = len(batches.rows), batches.size, batches

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, start: int) -> Iterator[Tensor]:
        assert start == 0, "a bench does not resume inside a training"
        return iter(self.rows)


def train(job: Job, batches: Batches, held_out: Tensor) -> Made:
    config = SAE_KINDS[job.kind]
    if job.variant == "dense":
        midiscover.sae.code.SPARSE_BELOW = midiscover.sae.code.SPARSE_BELOW_ON_GPU = 0
    if job.variant == "plain":
        midiscover.sae.pattern.KERNEL_DEVICES = ()
    if issubclass(config, TopKConfig):
        sae = config(d_sae=job.d_sae, k=round(job.sparsity))
    elif job.variant in ("sparse", "dense", "plain"):  # a step's time at this L0
        sae = config(d_sae=job.d_sae, initial_density=job.sparsity / job.d_sae)
    elif job.variant == "target_l0":
        sae = config(d_sae=job.d_sae, target_l0=job.sparsity)
    else:
        sae = config(d_sae=job.d_sae, l1_coefficient=job.sparsity)
    timed = job.variant in ("sparse", "dense", "plain")
    settings = TrainConfig(
        batch_size=job.batch_size,
        seed=job.seed,
        lr=job.lr or None,
        dtype="bfloat16" if job.precision == "bfloat16" else "float32",
        checkpoint_every=1e9,
        report_every=50,
        dead_window=10**12 if timed else None,  # nothing is dead in a peer's timed steps either
    )
    worker = SilentWorker()
    worker.device = torch.device(job.device)
    member = Member(id=job.name, config=sae, train=settings, d_sae=job.d_sae)
    (trained,) = train_members([member], RowSource(batches), worker)
    if not isinstance(trained, Trained):
        nan = torch.full((held_out.shape[1], job.d_sae), float("nan"))
        weights = {"W_enc": nan, "b_enc": nan[0], "W_dec": nan.T, "b_dec": nan[:, 0]}
        return Made({"architecture": "standard"}, weights, {"l0": 0.0, "fvu": math.inf})
    module = trained.sae
    shape = {"d_in": module.d_in, "d_sae": module.d_sae}
    cfg = {"architecture": ARCHITECTURES[job.kind].saelens_architecture, **module.saelens_fields()}
    loaded = folded_sae(cfg | shape, trained.weights)
    loaded.to(job.device)
    return Made(cfg, trained.weights, measured(loaded.encode, loaded.decode, held_out))


if __name__ == "__main__":
    main(train)
