"""Planted dictionaries: activations that are sparse sums of known atoms, and how well an SAE finds them.

x = mean + sum_i code_i * atom_i + noise. Which atoms fire follows a Gaussian copula: rates fall as a power of the rank,
and atoms of a group fire together. Magnitudes are log-normal. For transcoders the same code is written with a second
dictionary, plus a linear map of x where one is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from midiscover.member import Trained
from midiscover.sae.base import Normalisation, Sae
from midiscover.sae.metrics import MetricSums
from midiscover.sae.registry import folded_sae
from midiscover.train import Pair

RATE_POWER = 0.7
MAX_RATE = 0.4
"""No atom fires on more than this share of the rows."""
MAGNITUDE_SIGMA = 0.5
"""Standard deviation of the log of a magnitude, whose mean is 1: one in a hundred is above 2.8."""
HELD_OUT_SEED = 10**6
"""Seeds of training streams lie below it."""
RECOVERED = 0.9
"""Cosine from which on an atom counts as found."""
HUNGARIAN_ATOMS = 2048
"""Up to so many atoms the best matching is computed; it takes time with the third power of their number."""
SAMPLE_ROWS = 4096
"""Rows of which the moments are taken."""


class Rows(NamedTuple):
    """Rows at two hooks and the code behind both."""

    x: Tensor
    """[rows, d_in]."""
    y: Tensor
    """[rows, d_out]."""
    code: Tensor
    """[rows, n_true]."""


class PlantedDictionary:
    """Known unit atoms and the law by which they fire; `rows` is a pure function of seed and number."""

    def __init__(
        self,
        *,
        d_in: int = 64,
        n_true: int = 128,
        l0: float = 6.0,
        group_size: int = 8,
        correlation: float = 0.5,
        noise: float = 0.02,
        skip: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """l0: atoms per row in the mean. group_size: atoms that fire together, frequent and rare ones; correlation: of
        their Gaussians. noise: its standard deviation in each dimension. skip: gain of the linear map from x to y."""
        # Atoms i and j share a group where i = j modulo the number of groups.
        self.l0, self.groups, self.correlation = l0, n_true // group_size, correlation
        self.noise, self.seed = noise, seed
        self.device = torch.device(device)
        g = self._generator(HELD_OUT_SEED + 1)
        self.atoms, self.atoms_out = (normalize(self._normal(g, n_true, d_in), dim=1) for _ in range(2))
        self.mean, self.mean_out = (normalize(self._normal(g, 1, d_in)) * math.sqrt(l0) for _ in range(2))
        self.skip = self._normal(g, d_in, d_in) * (skip / math.sqrt(d_in))
        self.rates = firing_rates(n_true, l0).to(self.device)
        self.thresholds = torch.special.ndtri(1 - self.rates.double()).float()

    def _generator(self, number: int, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(hash((self.seed, seed, number)) % 2**63)

    def _normal(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=self.device)

    def rows(self, count: int, *, seed: int, number: int = 0) -> Rows:
        """Batch `number` of the endless stream `seed`."""
        g = self._generator(number, seed)
        shared = self._normal(g, count, self.groups).repeat(1, math.ceil(len(self.rates) / self.groups))
        own = self._normal(g, count, len(self.rates))
        gaussian = own.mul_(math.sqrt(1 - self.correlation)) + shared[:, : len(self.rates)] * self.correlation**0.5
        magnitude = self._normal(g, count, len(self.rates)).mul_(MAGNITUDE_SIGMA).sub_(MAGNITUDE_SIGMA**2 / 2).exp_()
        code = magnitude * (gaussian > self.thresholds)
        spread = code @ self.atoms + self.noise * self._normal(g, count, self.atoms.shape[1])
        return Rows(self.mean + spread, self.mean_out + code @ self.atoms_out + spread @ self.skip, code)

    def held_out(self, count: int = 8192) -> Rows:
        """Rows that no training stream holds."""
        return self.rows(count, seed=HELD_OUT_SEED)


def firing_rates(n_true: int, l0: float) -> Tensor:
    """[n_true] power law of the rank with sum `l0`, cut at MAX_RATE."""
    law = torch.arange(1, n_true + 1).double() ** -RATE_POWER
    rates = law * (l0 / law.sum())
    for _ in range(50):  # what the cut takes away, the others get
        cut = rates >= MAX_RATE
        free = law * ~cut
        rates = torch.where(cut, MAX_RATE, free * ((l0 - MAX_RATE * cut.sum()) / free.sum()))
    return rates.float()


class PlantedSource:
    """Batches of a planted dictionary as `midiscover.train.Source`: endless and new, or `rows` fixed ones, shuffled."""

    def __init__(
        self,
        planted: PlantedDictionary,
        *,
        batch_size: int,
        steps: int,
        seed: int = 0,
        pairs: bool = False,
        rows: int | None = None,
    ) -> None:
        """rows: how many rows an epoch holds, kept in memory as bfloat16; None: none comes twice."""
        self.planted, self.batch_size, self.steps, self.seed, self.pairs = planted, batch_size, steps, seed, pairs
        self.rows_per_epoch = rows or batch_size * steps
        sample = planted.rows(SAMPLE_ROWS, seed=seed, number=-1)
        self.inputs = normalisation(sample.x)
        self.outputs = normalisation(sample.y) if pairs else self.inputs
        self.fixed: Tensor | None = None
        if rows is not None:
            made = (planted.rows(batch_size, seed=seed, number=i).x for i in range(rows // batch_size))
            self.fixed = torch.cat([part.bfloat16() for part in made])
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.steps

    def batches(self, start: int) -> Iterator[Tensor | Pair]:
        """Batches from number `start` on."""
        for step in range(start, self.steps):
            if self.fixed is not None:
                yield self._again(step)
                continue
            made = self.planted.rows(self.batch_size, seed=self.seed, number=step)
            yield Pair(made.x, made.y) if self.pairs else made.x

    def _again(self, step: int) -> Tensor:
        assert self.fixed is not None
        epoch, number = divmod(step, len(self.fixed) // self.batch_size)
        if self.order[0] != epoch:
            g = torch.Generator().manual_seed(self.seed + epoch)
            self.order = epoch, torch.randperm(len(self.fixed), generator=g).to(self.fixed.device)
        return self.fixed[self.order[1][number * self.batch_size :][: self.batch_size]]


def normalisation(rows: Tensor) -> Normalisation:
    """The moments of `rows` [rows, d] as a harvest's manifest gives them."""
    mean = rows.mean(0)
    centred = rows - mean
    scale = math.sqrt(rows.shape[1]) / float(centred.norm(dim=1).mean())
    return Normalisation(mean.cpu(), scale, float(centred.pow(2).sum(1).mean()))


class Scores(NamedTuple):
    """How well an SAE knows the planted dictionary, on held-out rows."""

    recovered: float
    """Share of atoms with cosine >= RECOVERED to the decoder row matched with them one to one."""
    mean_max_cosine: float
    """Mean over atoms of the largest cosine to any decoder row."""
    fvu: float
    l0: float
    dead: float
    """Share of features that fire on no held-out row."""


def folded(trained: Trained) -> Sae:
    """The SAE as others load it: by SAELens' architecture and the folded weights."""
    sae = trained.sae
    sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae, "d_out": sae.d_out}
    cfg = {"architecture": sae.saelens_architecture} | sizes | sae.saelens_fields()
    return folded_sae(cfg, trained.weights)


def scores(trained: Trained, source: PlantedSource, held_out: Rows) -> Scores:
    """All scores of one SAE trained on `source`."""
    sae = folded(trained).to(held_out.x.device)
    target = held_out.y if source.pairs else held_out.x
    sums = MetricSums(sae.d_sae, source.outputs.mean)
    with torch.no_grad():
        for x, y in zip(held_out.x.split(2048), target.split(2048), strict=True):
            features = sae.encode(x)
            sums.update(y, sae.output(x, features), features)
    cosines = atom_cosines(sae, source)
    found = sums.result()
    return Scores(
        _share(cosines, source.planted), float(cosines.amax(1).mean()), found["fvu"], found["l0"], found["dead_share"]
    )


def atom_cosines(sae: Sae, source: PlantedSource) -> Tensor:
    """[n_true, d_sae] cosines of what each atom adds to the output with the decoder rows of a folded SAE.

    Where the SAE has a linear skip connection S, an atom's share that S carries is no feature's work:
    code @ out + x @ A = code @ (out + atoms @ (A - S)) + x @ S, whatever S is.
    """
    planted = source.planted
    wanted = planted.atoms
    if source.pairs:
        skip = dict(sae.named_parameters()).get("W_skip", torch.zeros_like(planted.skip)).detach()
        wanted = planted.atoms_out + planted.atoms @ (planted.skip - skip.T)
    return normalize(wanted, dim=1) @ normalize(sae.W_dec.detach(), dim=1).T


def _share(cosines: Tensor, planted: PlantedDictionary) -> float:
    """Of atoms that are recovered, matched where that can be: benches on GPUs of others have no scipy."""
    if len(cosines) <= HUNGARIAN_ATOMS:
        with suppress(ModuleNotFoundError):
            return recovered(cosines)
    return recovered_by_maximum(cosines, planted)


def recovered(cosines: Tensor) -> float:
    """Share of atoms whose partner in the best one-to-one matching [n_true, d_sae] reaches RECOVERED."""
    from scipy.optimize import linear_sum_assignment

    atoms, features = linear_sum_assignment(cosines.cpu().double().numpy(), maximize=True)
    return float((cosines.cpu()[atoms, features] >= RECOVERED).double().sum() / len(cosines))


def recovered_by_maximum(cosines: Tensor, planted: PlantedDictionary) -> float:
    """Share of atoms that some decoder row reaches with RECOVERED, for more atoms than the matching can take.

    One to one all the same: a row within arccos(0.9) of two atoms would put them at a cosine of at least
    2 * 0.9^2 - 1 = 0.62 to each other, and no two atoms are so close. AssertionError where two are.
    """
    for i, chunk in enumerate(planted.atoms.split(1024)):
        others = (chunk @ planted.atoms.T).diagonal_scatter(torch.zeros(len(chunk)).to(chunk), offset=1024 * i)
        assert float(others.max()) < 2 * RECOVERED**2 - 1
    return float((cosines.amax(1) >= RECOVERED).double().mean())
