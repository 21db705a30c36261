"""The contexts that are kept of each feature, in memory of features x contexts x their length.

Three groups: the highest activations, one per window at most; some of each of eight equal intervals of (0, R], drawn
by the smallest of a hash of feature and row; and rows drawn beforehand. What is kept follows from the rows alone, not
from their order or from how they were cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from midiscover.config import FeaturesConfig
from midiscover.features.histogram import BINS, bin_of

INTERVALS = 8
_BINS_PER_INTERVAL = BINS // INTERVALS
_LAST = torch.iinfo(torch.int64).max


class Codes:
    """The dense code of consecutive whole windows, from which values around a row are taken."""

    def __init__(
        self, codes: Tensor, usable: Tensor, first_row: int, context_size: int, settings: FeaturesConfig
    ) -> None:
        """codes: [rows, d_sae], 0 where `usable`, bool [rows], is false."""
        self.codes, self.usable, self.first_row, self.context_size = codes, usable, first_row, context_size
        self.offsets = torch.arange(-settings.context_before, settings.context_after + 1, device=codes.device)

    def around(self, places: Tensor, features: Tensor) -> Tensor:
        """[n, length] values of features [n] at the tokens around places [n]; 0 outside of the window."""
        position = (places % self.context_size)[:, None] + self.offsets
        inside = (position >= 0) & (position < self.context_size)
        rows = (places[:, None] + self.offsets).clamp(0, len(self.codes) - 1)
        return self.codes[rows, features[:, None]] * inside


class Top:
    """The highest activations of each feature, highest first; equal ones by row."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.values, self.rows, self.contexts = state["values"], state["rows"], state["contexts"]

    @classmethod
    def empty(cls, d_sae: int, settings: FeaturesConfig, device: torch.device | str = "cpu") -> Self:
        """Nothing kept: values 0."""
        return cls(_nothing((d_sae, settings.top_contexts), settings, device))

    def state(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {"values": self.values, "rows": self.rows, "contexts": self.contexts}

    def add(self, batch: Codes) -> None:
        """The maxima of a batch's windows."""
        windows = batch.codes.view(-1, batch.context_size, batch.codes.shape[1])
        values, position = windows.max(dim=1)  # the first of equal ones
        better = (values > self.values[:, -1]).T & (values > 0).T
        features = better.any(dim=1).nonzero().flatten()
        if not len(features):
            return
        start = torch.arange(len(windows), device=values.device)[:, None] * batch.context_size
        places = (start + position).T[features]
        candidates = torch.where(better[features], values.T[features], 0.0)
        flat, owner = places.flatten(), features.repeat_interleave(places.shape[1])
        wanted = (candidates.flatten() > 0).nonzero().flatten()
        contexts = torch.zeros(len(flat), len(batch.offsets), device=values.device)
        contexts[wanted] = batch.around(flat[wanted], owner[wanted])
        rows = torch.where(candidates > 0, places + batch.first_row, _LAST)
        self._put(features, candidates, rows, contexts.view(*places.shape, -1))

    def merge(self, other: Self) -> None:
        """Keep the highest of both."""
        everything = torch.arange(len(self.values), device=self.values.device)
        self._put(everything, other.values, other.rows, other.contexts)

    def _put(self, features: Tensor, values: Tensor, rows: Tensor, contexts: Tensor) -> None:
        keep = self.values.shape[1]
        values = torch.cat([self.values[features], values], dim=1)
        rows = torch.cat([self.rows[features], rows], dim=1)
        by_row = rows.argsort(dim=1, stable=True)
        by_value = values.gather(1, by_row).argsort(dim=1, descending=True, stable=True)
        order = by_row.gather(1, by_value)[:, :keep]
        contexts = torch.cat([self.contexts[features], contexts], dim=1)
        self.values[features] = values.gather(1, order)
        self.rows[features] = rows.gather(1, order)
        self.contexts[features] = contexts.gather(1, order[:, :, None].expand(-1, -1, contexts.shape[2]))


class Intervals:
    """Activations drawn at random from each interval of each feature: those with the smallest hashes."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.hashes, self.values = state["hashes"], state["values"]
        self.rows, self.contexts = state["rows"], state["contexts"]

    @classmethod
    def empty(cls, d_sae: int, settings: FeaturesConfig, device: torch.device | str = "cpu") -> Self:
        """Nothing kept: hashes at their largest. Row i of the state is interval i % 8 of feature i // 8."""
        shape = (d_sae * INTERVALS, settings.interval_contexts)
        hashes = torch.full(shape, _LAST, dtype=torch.int64, device=device)
        return cls({"hashes": hashes, **_nothing(shape, settings, device)})

    def state(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {"hashes": self.hashes, "values": self.values, "rows": self.rows, "contexts": self.contexts}

    def grow(self, doublings: Tensor) -> None:
        """Put what is kept into wider intervals: 2^doublings as wide, int [d_sae]."""
        growing = (doublings > 0).repeat_interleave(INTERVALS)
        held = (growing[:, None] & (self.hashes < _LAST)).nonzero()
        if not len(held):
            return
        group, slot = held.unbind(1)
        hashes, values = self.hashes[group, slot], self.values[group, slot]
        rows, contexts = self.rows[group, slot], self.contexts[group, slot]
        self.hashes[group, slot] = self.rows[group, slot] = _LAST
        self.values[group, slot] = self.contexts[group, slot] = 0
        feature = group // INTERVALS
        interval = (group % INTERVALS) >> doublings[feature].clamp(0, 3).long()
        self._put(feature * INTERVALS + interval, hashes, values, rows, contexts)

    def add(self, batch: Codes, places: Tensor, features: Tensor, values: Tensor, exponent: Tensor) -> None:
        """Activations above 0: values [n] of features [n] at places [n] of a batch; exponent [d_sae] of each R."""
        if not self.hashes.shape[1]:
            return
        group = features * INTERVALS + bin_of(values, exponent[features]) // _BINS_PER_INTERVAL
        rows = places + batch.first_row
        hashes = row_hash(features, rows)
        wanted = (hashes < self.hashes[group, -1]).nonzero().flatten()
        if len(wanted):
            contexts = batch.around(places[wanted], features[wanted])
            self._put(group[wanted], hashes[wanted], values[wanted], rows[wanted], contexts)

    def merge(self, other: Self) -> None:
        """Keep the smallest hashes of both; both in the same ranges (`grow` first)."""
        group, slot = (other.hashes < _LAST).nonzero().unbind(1)
        if len(group):
            held = (other.hashes[group, slot], other.values[group, slot], other.rows[group, slot])
            self._put(group, *held, other.contexts[group, slot])

    def _put(self, group: Tensor, hashes: Tensor, values: Tensor, rows: Tensor, contexts: Tensor) -> None:
        keep = self.hashes.shape[1]
        order = hashes.argsort(stable=True)
        order = order[group[order].argsort(stable=True)]
        groups, counts = group[order].unique_consecutive(return_counts=True)
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        first = rank < keep
        order, rank = order[first], rank[first]
        line = torch.searchsorted(groups, group[order])
        new = torch.full((len(groups), keep), _LAST, dtype=torch.int64, device=order.device)
        source = torch.zeros_like(new)
        new[line, rank], source[line, rank] = hashes[order], order
        both = torch.cat([self.hashes[groups], new], dim=1)
        chosen = both.argsort(dim=1, stable=True)[:, :keep]
        is_new = chosen >= keep
        old = chosen.clamp(max=keep - 1)
        fresh = source.gather(1, (chosen - keep).clamp(min=0))
        self.hashes[groups] = both.gather(1, chosen)
        for name, given in (("values", values), ("rows", rows), ("contexts", contexts)):
            held = getattr(self, name)
            lines = groups[:, None].expand_as(old)
            mine = is_new.view(*is_new.shape, *([1] * (given.ndim - 1)))
            kept = torch.where(mine, given[fresh], held[lines, old])
            # What nothing is kept of has one look, so that equal contents are equal tensors.
            nothing = (self.hashes[groups] == _LAST).view(mine.shape)
            held[groups] = kept.masked_fill(nothing, _LAST if name == "rows" else 0)


class Drawn:
    """Contexts of rows that were drawn beforehand, whatever the feature does there; masked ones do not count."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.rows, self.values, self.contexts = state["rows"], state["values"], state["contexts"]
        self.usable = state["usable"]

    @classmethod
    def empty(cls, rows: Tensor, settings: FeaturesConfig, device: torch.device | str = "cpu") -> Self:
        """rows: [d_sae, n] row numbers."""
        state = _nothing(tuple(rows.shape), settings, device)
        usable = torch.zeros(rows.shape, dtype=torch.bool, device=device)
        return cls(state | {"rows": rows.to(device), "usable": usable})

    def state(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {"rows": self.rows, "values": self.values, "contexts": self.contexts, "usable": self.usable}

    def add(self, batch: Codes) -> None:
        """Take the drawn rows that lie in a batch."""
        places = self.rows - batch.first_row
        features, slots = ((places >= 0) & (places < len(batch.codes))).nonzero().unbind(1)
        if len(features):
            here = places[features, slots]
            self.usable[features, slots] = batch.usable[here]
            self.values[features, slots] = batch.codes[here, features]
            self.contexts[features, slots] = batch.around(here, features)

    def merge(self, other: Self) -> None:
        """Of each row one of the two has read the block; what the other has is 0."""
        self.usable |= other.usable
        self.values += other.values
        self.contexts += other.contexts


def row_hash(features: Tensor, rows: Tensor) -> Tensor:
    """A number in [0, 2^63) of feature and row, evenly spread: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = features * -7046029254386353131 + rows * -4658895280553007687
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return _shifted(x ^ _shifted(x, 31), 1)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _nothing(shape: tuple[int, ...], settings: FeaturesConfig, device: torch.device | str) -> dict[str, Tensor]:
    length = settings.context_before + 1 + settings.context_after
    return {
        "values": torch.zeros(shape, device=device),
        "rows": torch.full(shape, _LAST, dtype=torch.int64, device=device),
        "contexts": torch.zeros(*shape, length, device=device),
    }
