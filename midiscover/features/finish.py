"""A merged part becomes features.parquet and contexts.parquet, with a manifest written last.

Works through the features in slices, so that no table of [d_sae, vocabulary] or of all contexts is in memory.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from midiscover import lineage
from midiscover.configio import to_tree
from midiscover.corpus import Corpus
from midiscover.features.collect import Part
from midiscover.features.contexts import ContextTables, context_table
from midiscover.features.directions import lens, neighbours, neurons, unit_rows
from midiscover.features.histogram import BINS
from midiscover.features.plan import Plan
from midiscover.features.records import CONTEXTS, FEATURES, GROUP, QUANTILE_SHARES, VERSION
from midiscover.features.relations import Related, Relations, slices
from midiscover.ids import features_id
from midiscover.sae.base import Sae
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.storage import Storage

RELATED, RELATED_INPUTS, TOP_TOKENS = 10, 3, 5


@dataclass(frozen=True, kw_only=True)
class Finisher:
    """What the records of an SAE need besides what its features did."""

    storage: Storage
    sae_id: str
    sae: Sae
    plan: Plan
    corpus: Corpus
    strings: Callable[[list[int]], list[str]]
    """Ids to token strings, as `tokens.TokenStrings` has them."""
    unembedding: Tensor | None
    """[vocabulary, d_model]; None leaves the logit lens out."""
    device: torch.device | str = "cpu"

    def finish(self, part: Part) -> dict[str, Any]:
        """Write both files, then the manifest, which is returned. Records that stood there are replaced: a manifest
        must name the bytes that were written last.
        """
        began, name = time.monotonic(), features_id(self.plan.settings)
        tables = ContextTables(part, self.plan, self.corpus, self.strings)
        relations = Relations(part.sample, self.sae.d_sae, self.device)
        related = (relations.features(RELATED), relations.inputs(RELATED_INPUTS))
        features, contexts = io.BytesIO(), io.BytesIO()
        writers: list[pq.ParquetWriter] = []
        for start, stop in slices(self.sae.d_sae, GROUP):
            pieces = context_table(tables, start, stop)
            table = pa.Table.from_pydict(
                self._columns(part, *related, start, stop) | {"top_tokens": _peaks(pieces, start, stop)}
            )
            if not writers:
                writers = [pq.ParquetWriter(features, _typed(table).schema), pq.ParquetWriter(contexts, pieces.schema)]
            writers[0].write_table(_typed(table), row_group_size=GROUP)
            writers[1].write_table(pieces, row_group_size=max(1, len(pieces)))
        for writer in writers:
            writer.close()
        files = {}
        for file, buffer in ((FEATURES, features), (CONTEXTS, contexts)):
            data = buffer.getvalue()
            self.storage.write(layout.features_file(self.sae_id, name, file), data)
            files[file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest = {
            "v": VERSION,
            "sae": self.sae_id,
            "features_id": name,
            "settings": to_tree(self.plan.settings),
            "d_sae": self.sae.d_sae,
            "alive": int((part.histogram.count > 0).sum()),
            "tokens": part.tokens,
            "rows": part.rows,
            "harvest": self.plan.manifest.harvest_id,
            "hook": self.plan.manifest.hook,
            "corpus": self.corpus.manifest.id,
            "files": files,
            "created": lineage.now(),
            "seconds": round(time.monotonic() - began, 3),
        }
        self.storage.write(layout.features_manifest(self.sae_id, name), dump(manifest))
        return manifest

    def _columns(self, part: Part, coactive: Related, correlated: Related, start: int, stop: int) -> dict[str, Any]:
        directions = self._decoder[start:stop]
        near = neighbours(self._unit_decoder, start, stop)
        neuron, share = neurons(directions)
        active, inputs = (Related(*(tensor[start:stop] for tensor in all_)) for all_ in (coactive, correlated))
        return {
            "index": np.arange(start, stop),
            **_statistics(part, start, stop),
            **self._lens(directions),
            "neighbour_index": near.indices.tolist(),
            "neighbour_cosine": near.value.tolist(),
            "coactive_index": _known(active.indices, active.indices),
            "coactive_pearson": _known(active.pearson, active.indices),
            "coactive_cosine": _known(active.cosine, active.indices),
            "neuron_index": neuron.indices.tolist(),
            "neuron_value": neuron.value.tolist(),
            "neuron_l1": share.tolist(),
            "input_index": _known(inputs.indices, inputs.indices),
            "input_pearson": _known(inputs.pearson, inputs.indices),
            "input_cosine": _known(inputs.cosine, inputs.indices),
        }

    @cached_property
    def _decoder(self) -> Tensor:
        return self.sae.W_dec.detach().to(self.device, torch.float32)

    @cached_property
    def _unit_decoder(self) -> Tensor:
        return unit_rows(self._decoder)

    @cached_property
    def _logits(self) -> Tensor:
        """W_U in float32 on the device, converted once."""
        assert self.unembedding is not None
        return self.unembedding.to(self.device, torch.float32)

    def _lens(self, directions: Tensor) -> dict[str, Any]:
        if self.unembedding is None or self.unembedding.shape[1] != directions.shape[1]:
            nothing: list[list[Any]] = [[] for _ in directions]
            names = ("pos_ids", "pos_tokens", "pos_values", "neg_ids", "neg_tokens", "neg_values")
            return dict.fromkeys((*names, "logit_hist_heights", "logit_hist_values"), nothing)
        seen = lens(directions, self._logits)
        return {
            "pos_ids": seen.top_ids.tolist(),
            "pos_tokens": [self.strings(ids) for ids in seen.top_ids.tolist()],
            "pos_values": seen.top.tolist(),
            "neg_ids": seen.bottom_ids.tolist(),
            "neg_tokens": [self.strings(ids) for ids in seen.bottom_ids.tolist()],
            "neg_values": seen.bottom.tolist(),
            "logit_hist_heights": seen.heights.tolist(),
            "logit_hist_values": seen.centres.tolist(),
        }


def _statistics(part: Part, start: int, stop: int) -> dict[str, Any]:
    histogram = part.histogram
    count = histogram.count[start:stop].double().cpu()
    fired = count.clamp(min=1)
    mean = histogram.total[start:stop].cpu() / fired
    variance = (histogram.squares[start:stop].cpu() / fired - mean**2).clamp(min=0)
    maxima = histogram.max[start:stop].double().cpu()
    width = torch.ldexp(torch.ones_like(maxima), histogram.exponent[start:stop].double().cpu()) / BINS
    bins = histogram.bins[start:stop].cpu()
    shown = torch.where(maxima > 0, (maxima / width).ceil(), 0.0).long().tolist()
    return {
        "count": count.long().numpy(),
        "firing_rate": (count / max(1, part.tokens)).numpy(),
        "mean": mean.numpy(),
        "max": maxima.numpy(),
        "std": variance.sqrt().numpy(),
        "quantiles": _quantiles(bins, width, maxima),
        "hist_heights": [line[:n].tolist() for line, n in zip(bins, shown, strict=True)],
        "hist_values": [((torch.arange(n) + 0.5) * w).tolist() for n, w in zip(shown, width, strict=True)],
    }


def _quantiles(bins: Tensor, width: Tensor, maxima: Tensor) -> list[list[float]]:
    """Of each line's activations, linear within a bin; exact to a bin, so to 1/64 of the maximum at worst."""
    ends = bins.cumsum(1).double()
    found = []
    for share in QUANTILE_SHARES:
        wanted = share * ends[:, -1:]
        place = torch.searchsorted(ends, wanted).clamp(max=BINS - 1)
        below = ends.gather(1, place) - bins.gather(1, place)
        inside = (wanted - below) / bins.gather(1, place).clamp(min=1)
        found.append(torch.minimum((place + inside.clamp(0, 1)).flatten() * width, maxima))
    alive = (maxima > 0).tolist()
    return [line if is_alive else [] for line, is_alive in zip(torch.stack(found, 1).tolist(), alive, strict=True)]


def _known(values: Tensor, index: Tensor) -> list[list[Any]]:
    """Lists without the places whose index is -1."""
    return [
        [v for v, i in zip(line, where, strict=True) if i >= 0]
        for line, where in zip(values.tolist(), index.tolist(), strict=True)
    ]


def _peaks(contexts: pa.Table, start: int, stop: int) -> list[list[str]]:
    """For each feature the tokens at the peaks of its top contexts, the most frequent first."""
    counts: dict[int, Counter[str]] = {feature: Counter() for feature in range(start, stop)}
    top = contexts.filter(pa.array(contexts["kind"].to_numpy() == "top"))
    tokens = top["tokens"].combine_chunks()
    peaks = tokens.offsets.to_numpy()[:-1] + top["position"].to_numpy() - top["start"].to_numpy()
    for feature, token in zip(top["feature"].to_pylist(), tokens.values.take(pa.array(peaks)).to_pylist(), strict=True):
        counts[feature][token] += 1
    return [[token for token, _ in counts[feature].most_common(TOP_TOKENS)] for feature in range(start, stop)]


_TYPES: Mapping[str, pa.DataType] = {
    "index": pa.int32(),
    "count": pa.int64(),
    "firing_rate": pa.float64(),
    "mean": pa.float32(),
    "max": pa.float32(),
    "std": pa.float32(),
    "hist_heights": pa.list_(pa.int64()),
    "logit_hist_heights": pa.list_(pa.int64()),
}


def _type_of(name: str) -> pa.DataType:
    if name in _TYPES:
        return _TYPES[name]
    if name.endswith("tokens"):
        return pa.list_(pa.string())
    return pa.list_(pa.int32() if name.endswith(("_index", "_ids")) else pa.float32())


def _typed(table: pa.Table) -> pa.Table:
    """The same columns in their declared types; a slice of dead features would else have lists of nothing."""
    return table.cast(pa.schema([(name, _type_of(name)) for name in table.column_names]))
