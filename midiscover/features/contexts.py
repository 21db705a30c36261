"""Kept rows as contexts: tokens, values, and the place in the corpus; as columns of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from midiscover.corpus import Corpus
from midiscover.features.collect import Part
from midiscover.features.examples import INTERVALS
from midiscover.features.histogram import BINS
from midiscover.features.plan import Plan

SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("kind", pa.string()),
        ("rank", pa.int32()),
        ("bin_min", pa.float32()),
        ("bin_max", pa.float32()),
        ("bin_share", pa.float64()),
        ("value", pa.float32()),
        ("window", pa.int32()),
        ("position", pa.int32()),
        ("document", pa.int32()),
        ("start", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
    ]
)


class _Entries(NamedTuple):
    """Contexts of one kind, n of them, in the order in which they are written."""

    feature: Tensor
    bin: Tensor
    """[n, 3] float64: bin_min, bin_max, bin_share; NaN where there is none."""
    value: Tensor
    row: Tensor
    values: Tensor
    """[n, before + 1 + after]"""


class ContextTables:
    """What all slices of features share: the windows that contexts lie in."""

    def __init__(self, part: Part, plan: Plan, corpus: Corpus, strings: Callable[[list[int]], list[str]]) -> None:
        self.part, self.plan, self.strings = part, plan, strings
        kept = [
            part.top.rows[part.top.values > 0],
            part.intervals.rows[part.intervals.values > 0],
            part.drawn.rows[part.drawn.usable],
        ]
        rows = torch.cat([rows.flatten().cpu() for rows in kept])
        self.windows: NDArray[np.int64] = torch.unique(rows // plan.context_size).numpy()
        self.ids = np.empty((len(self.windows), plan.context_size), np.int32)
        self.documents = np.empty_like(self.ids)
        for shard in corpus.manifest.shards:
            inside = (self.windows >= shard.start_window) & (self.windows < shard.stop_window)
            if inside.any():
                whole = corpus.windows(shard.start_window, shard.stop_window)
                self.ids[inside] = whole.ids[self.windows[inside] - shard.start_window]
                self.documents[inside] = whole.doc[self.windows[inside] - shard.start_window]
        # Every id once, so that a token's string is looked up by its place here.
        self.known = np.unique(self.ids)
        self.names = pa.array(strings(self.known.tolist()), pa.string())


def context_table(tables: ContextTables, start: int, stop: int) -> pa.Table:
    """All contexts of features [start, stop), by feature, then top, interval and random ones."""
    part = tables.part
    groups = {
        "top": _top(part, start, stop),
        "interval": _intervals(part, start, stop),
        "random": _drawn(part, start, stop),
    }
    pieces = [_columns(tables, kind, entries) for kind, entries in groups.items()]
    whole = pa.concat_tables(pieces)
    kinds = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    by = np.lexsort((whole["rank"].to_numpy(), kinds, whole["feature"].to_numpy()))
    return whole.take(pa.array(by))


def _top(part: Part, start: int, stop: int) -> _Entries:
    values = part.top.values[start:stop].cpu()
    feature, slot = (values > 0).nonzero().unbind(1)
    maxima = part.histogram.max[start:stop].cpu().double()[feature]
    bins = torch.stack([torch.full_like(maxima, -1), maxima, torch.full_like(maxima, -1)], 1)
    rows, contexts = part.top.rows[start:stop].cpu(), part.top.contexts[start:stop].cpu()
    return _Entries(feature + start, bins, values[feature, slot], rows[feature, slot], contexts[feature, slot])


def _intervals(part: Part, start: int, stop: int) -> _Entries:
    lines = slice(start * INTERVALS, stop * INTERVALS)
    kept, length = part.intervals.contexts.shape[1:]
    values = part.intervals.values[lines].cpu().view(stop - start, INTERVALS, kept).flip(1)  # from high to low
    rows = part.intervals.rows[lines].cpu().view(*values.shape).flip(1)
    held = part.intervals.hashes[lines].cpu().view(*values.shape).flip(1) < torch.iinfo(torch.int64).max
    contexts = part.intervals.contexts[lines].cpu().view(*values.shape, length).flip(1)
    feature, place, slot = held.nonzero().unbind(1)
    interval = INTERVALS - 1 - place
    width = torch.ldexp(
        torch.ones(stop - start, dtype=torch.float64), part.histogram.exponent[start:stop].cpu().double()
    )
    width = width[feature] / INTERVALS
    counts = part.histogram.bins[start:stop].cpu().view(-1, INTERVALS, BINS // INTERVALS).sum(2).double()
    share = counts[feature, interval] / max(1, part.tokens)
    bins = torch.stack([interval * width, (interval + 1) * width, share], 1)
    picked = (feature, place, slot)
    return _Entries(feature + start, bins, values[picked], rows[picked], contexts[picked])


def _drawn(part: Part, start: int, stop: int) -> _Entries:
    feature, slot = part.drawn.usable[start:stop].cpu().nonzero().unbind(1)
    bins = torch.full((len(feature), 3), torch.nan, dtype=torch.float64)
    drawn = (part.drawn.values, part.drawn.rows, part.drawn.contexts)
    values, rows, contexts = (tensor[start:stop].cpu()[feature, slot] for tensor in drawn)
    return _Entries(feature + start, bins, values, rows, contexts)


def _columns(tables: ContextTables, kind: str, entries: _Entries) -> pa.Table:
    plan = tables.plan
    before, after = plan.settings.context_before, plan.settings.context_after
    feature, row = entries.feature.numpy(), entries.row.numpy()
    window, position = np.divmod(row, plan.context_size)
    start = np.maximum(position - before, 0)
    stop = np.minimum(position + after + 1, plan.context_size)
    line = np.searchsorted(tables.windows, window)
    document = tables.documents[line, position]
    # Places of all tokens of all contexts, one context after another.
    lengths = stop - start
    ends = lengths.cumsum()
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths) + np.repeat(start, lengths)
    owner = np.repeat(np.arange(len(row)), lengths)
    ids = tables.ids[line[owner], place]
    values = entries.values.numpy()[owner, place - position[owner] + before]
    names = tables.names.take(pa.array(np.searchsorted(tables.known, ids)))
    bins = entries.bin.numpy()
    columns = {
        "feature": feature,
        "kind": [kind] * len(row),
        "rank": _ranks(feature),
        "bin_min": _or_null(bins[:, 0]),
        "bin_max": _or_null(bins[:, 1]),
        "bin_share": _or_null(bins[:, 2]),
        "value": entries.value.numpy(),
        "window": window,
        "position": position,
        "document": pa.array(document, pa.int32(), mask=document < 0),
        "start": start,
        "token_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
        "tokens": pa.ListArray.from_arrays(offsets, names),
        "values": pa.ListArray.from_arrays(offsets, pa.array(values, pa.float32())),
    }
    arrays = [_array(columns[field.name], field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return (values if isinstance(values, pa.Array) else pa.array(values)).cast(kind)


def _or_null(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _ranks(feature: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each entry among those of its feature; features come in order."""
    first = np.searchsorted(feature, feature)
    return np.arange(len(feature)) - first
