"""One chunk of stored activations through the SAEs of a hook, into parts that merge: everything that needs the rows.

Each batch is read and encoded once by each SAE; what is kept is bounded by the features, not by the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from midiscover.features.examples import Codes, Drawn, Intervals, Top
from midiscover.features.histogram import Histogram
from midiscover.features.plan import Plan
from midiscover.features.sample import Sample
from midiscover.sae.base import Sae
from midiscover.store.blocks import Mask, read_block
from midiscover.store.manifest import BlockRow
from midiscover.store.storage import Storage

CODE_BYTES = 256 * 2**20
"""Of the dense code of one batch, about; a window at least."""


class Part:
    """What one SAE's features did on some rows of a plan. Merging parts of all rows gives the same as one part."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            group, _, field = name.partition(".")
            groups.setdefault(group, {})[field] = tensor
        self.tokens = int(state["tokens.usable"])
        self.rows = int(state["tokens.rows"])
        self.histogram = Histogram(groups["histogram"])
        self.top, self.intervals = Top(groups["top"]), Intervals(groups["intervals"])
        self.drawn, self.sample = Drawn(groups["drawn"]), Sample(groups["sample"])

    @classmethod
    def empty(cls, plan: Plan, d_in: int, d_sae: int, device: torch.device | str = "cpu") -> Self:
        """Of no row."""
        settings = plan.settings
        return cls(
            _named(
                tokens={"usable": torch.tensor(0), "rows": torch.tensor(0)},
                histogram=Histogram.empty(d_sae, device).state(),
                top=Top.empty(d_sae, settings, device).state(),
                intervals=Intervals.empty(d_sae, settings, device).state(),
                drawn=Drawn.empty(plan.drawn(d_sae), settings, device).state(),
                sample=Sample.empty(d_in).state(),
            )
        )

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        state = _named(
            tokens={"usable": torch.tensor(self.tokens), "rows": torch.tensor(self.rows)},
            **{name: getattr(self, name).state() for name in ("histogram", "top", "intervals", "drawn", "sample")},
        )
        return save({name: tensor.cpu().contiguous() for name, tensor in state.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`, on the CPU."""
        return cls(load(data))

    def add(self, batch: Codes, usable: int) -> None:
        """A batch of whole windows whose masked rows are 0; `usable` rows of it are not masked."""
        self.tokens += usable
        self.rows += len(batch.codes)
        self.intervals.grow(self.histogram.grow(batch.codes.amax(dim=0)))
        places, features = batch.codes.nonzero().unbind(1)
        values = batch.codes[places, features]
        self.histogram.add(features, values)
        self.top.add(batch)
        self.intervals.add(batch, places, features, values, self.histogram.exponent)
        self.drawn.add(batch)

    def merge(self, other: Self) -> None:
        """Take in a part of other rows of the same plan."""
        self.tokens += other.tokens
        self.rows += other.rows
        before = self.histogram.exponent
        self.histogram.merge(other.histogram)
        self.intervals.grow(self.histogram.exponent - before)
        other.intervals.grow(self.histogram.exponent - other.histogram.exponent)
        self.intervals.merge(other.intervals)
        self.top.merge(other.top)
        self.drawn.merge(other.drawn)
        self.sample = Sample.joined([self.sample, other.sample])


def merged(parts: Iterable[Part]) -> Part:
    """All parts as one; at most two are in memory where `parts` loads them one by one."""
    whole: Part | None = None
    for part in parts:
        if whole is None:
            whole = part
        else:
            whole.merge(part)
    assert whole is not None, "a plan has one chunk at least"
    return whole


def collect_chunk(
    storage: Storage,
    saes: Mapping[str, Sae],
    plan: Plan,
    blocks: Sequence[BlockRow],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], Any] = lambda _rows: None,
) -> dict[str, Part]:
    """One part for each SAE, of the given blocks of a plan. `progress` is told the rows of each batch.

    CorruptError for a block that is gone or damaged.
    """
    modules = {name: sae.to(device) for name, sae in saes.items()}
    parts = {name: Part.empty(plan, sae.d_in, sae.d_sae, device) for name, sae in modules.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in saes}
    numbers = plan.sample()
    widest = max(sae.d_sae for sae in modules.values())
    step = max(1, CODE_BYTES // (4 * widest * plan.context_size)) * plan.context_size
    for row in blocks:
        block = read_block(storage, plan.manifest.harvest_id, plan.manifest.hook, row)
        first = row.start_window * plan.context_size
        for start in range(0, row.rows, step):
            stop = min(start + step, row.rows)
            x, keep = block.acts[start:stop].to(device), (block.mask[start:stop] == Mask.USABLE).to(device)
            rows = numbers[(numbers >= first + start) & (numbers < first + stop)]
            rows = rows[keep.cpu()[rows - first - start]]
            for name, sae in modules.items():
                with torch.no_grad():
                    # Not a product with the mask: masked rows may hold NaN.
                    codes = sae.encode(x.to(sae.W_enc)).float().masked_fill_(~keep[:, None], 0)
                batch = Codes(codes, keep, first + start, plan.context_size, plan.settings)
                parts[name].add(batch, int(keep.sum()))
                samples[name].append(_sampled(batch, x, rows))
            progress(stop - start)
    for name, part in parts.items():
        part.sample = Sample.joined([part.sample, *samples[name]])
    return parts


def _sampled(batch: Codes, x: Tensor, rows: Tensor) -> Sample:
    places = (rows - batch.first_row).to(x.device)
    codes = batch.codes[places]
    row, feature = codes.nonzero().unbind(1)
    state = {
        "numbers": rows,
        "inputs": x[places].bfloat16(),
        "row": row.int(),
        "feature": feature.int(),
        "value": codes[row, feature],
    }
    return Sample({name: tensor.cpu() for name, tensor in state.items()})


def _named(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}.{name}": tensor for group, state in groups.items() for name, tensor in state.items()}
