"""Feature records as they stand in the store: features.parquet, contexts.parquet and their manifest. Loads no torch.

A row group holds `GROUP` features in both files, so that one feature's contexts are found without reading the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import threading
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from midiscover.errors import CorruptError, NotFoundError
from midiscover.features.explanations import Explanation, newest
from midiscover.store import layout
from midiscover.store.storage import Storage

VERSION = 1
FEATURES, CONTEXTS = "features.parquet", "contexts.parquet"
GROUP = 256
"""Features of a row group."""
QUANTILE_SHARES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Of the activations of a feature, those that are 0 left out: the column `quantiles`."""


class Context(NamedTuple):
    """A stretch of text around one token."""

    kind: str
    """`top`, `interval` or `random`."""
    rank: int
    bin_min: float | None
    """Of the interval it was drawn from; -1 for `top`, None for `random`."""
    bin_max: float | None
    bin_share: float | None
    """Share of the usable tokens that lie in the interval; -1 for `top`."""
    value: float
    """Activation at the token it is about."""
    window: int
    position: int
    """Of that token within the window."""
    document: int | None
    """Number of its document in the corpus."""
    start: int
    """Position of the first token given here."""
    token_ids: list[int]
    tokens: list[str]
    values: list[float]

    @property
    def peak(self) -> int:
        """Place of the token it is about among `tokens`."""
        return self.position - self.start


class FeatureRecords:
    """The records of one SAE, for several threads. Cheap to open; what is read is checked against the manifest."""

    def __init__(self, storage: Storage, manifest: dict[str, Any], explained: Sequence[tuple[str, str]] = ()) -> None:
        """explained: keys and versions of what language models said of them, as it stood."""
        self.storage, self.manifest, self.explained = storage, manifest, tuple(explained)
        self.sae_id: str = manifest["sae"]
        self.features_id: str = manifest["features_id"]
        self.d_sae: int = manifest["d_sae"]
        self._reading = threading.Lock()

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per feature, in order of index; all columns or those named."""
        with self._reading:
            return self._features.read(list(columns) if columns is not None else None)

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The same as rows; all with their `explanation`, or None, where one is explained."""
        found = self.table(columns).to_pylist()
        if self.explanations:
            for feature, row in enumerate(found):
                explanation = self.explanations.get(feature)
                row["explanation"] = None if explanation is None else explanation.text
        return found

    def renewed(self, explained: Sequence[tuple[str, str]]) -> FeatureRecords:
        """These, with what is said of them now; what was read of their files is read no second time."""
        if tuple(explained) == self.explained:
            return self
        found = copy(self)  # with the lock, for the files are the same
        found.explained = tuple(explained)
        found.__dict__.pop("explanations", None)
        return found

    @cached_property
    def explanations(self) -> dict[int, Explanation]:
        """Feature -> what stands for it of what language models said."""
        return newest(self.storage, [key for key, _ in self.explained])

    @property
    def bytes(self) -> int:
        """Of the files that were read, which stay in memory."""
        opened = [name for name, held in ((FEATURES, "_features"), (CONTEXTS, "_contexts")) if held in self.__dict__]
        return sum(self.manifest["files"][name]["bytes"] for name in opened)

    def let_contexts_go(self) -> None:
        """Out of memory; they are read again when they are asked for."""
        self.__dict__.pop("_contexts", None)

    @property
    def source(self) -> str:
        """Of which SAE they are and of how much text, for a chart's subtitle."""
        return f"Of {self.sae_id}, on {self.manifest['tokens']:,} training tokens"

    def feature(self, index: int) -> dict[str, Any]:
        """All columns of one feature, and its `explanation`, None without one. NotFoundError out of range."""
        self.require(index)
        row = self._group(FEATURES, index // GROUP).slice(index % GROUP, 1).to_pylist()[0]
        return self._explained(row)

    def contexts(self, index: int) -> list[Context]:
        """The contexts of one feature: top, interval, random, each by rank. NotFoundError out of range."""
        self.require(index)
        group = self._group(CONTEXTS, index // GROUP)
        features = group["feature"].to_numpy()  # sorted
        start, stop = (int(np.searchsorted(features, index, side)) for side in ("left", "right"))
        return [_context(row) for row in group.slice(start, stop - start).to_pylist()]

    def batches(self, size: int = 1024) -> Iterator[tuple[list[dict[str, Any]], dict[int, list[Context]]]]:
        """Features in order, `size` at a time (fewer at the end), with the contexts of each."""
        features: list[dict[str, Any]] = []
        contexts: dict[int, list[Context]] = {}
        for group in range(math.ceil(self.d_sae / GROUP)):
            for row in self._group(FEATURES, group).to_pylist():
                features.append(self._explained(row))
                contexts[row["index"]] = []
            for row in self._group(CONTEXTS, group).to_pylist():
                contexts[row["feature"]].append(_context(row))
            while len(features) >= size:
                yield _split(features, contexts, size)
        if features:
            yield _split(features, contexts, size)

    def _group(self, name: str, number: int) -> pa.Table:
        """A row group; one at a time, for two threads that read from one ParquetFile at once end the process."""
        with self._reading:
            file = self._features if name == FEATURES else self._contexts
            return file.read_row_group(number)

    def _explained(self, row: dict[str, Any]) -> dict[str, Any]:
        explanation = self.explanations.get(row["index"])
        return {**row, "explanation": None if explanation is None else explanation.text}

    @cached_property
    def _features(self) -> pq.ParquetFile:
        return self._open(FEATURES)

    @cached_property
    def _contexts(self) -> pq.ParquetFile:
        return self._open(CONTEXTS)

    def _open(self, name: str) -> pq.ParquetFile:
        key = layout.features_file(self.sae_id, self.features_id, name)
        try:
            data = self.storage.read(key)
        except FileNotFoundError as error:
            raise CorruptError(f"{key} in {self.storage.uri} is gone, which its manifest names.") from error
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise CorruptError(
                f"{key} in {self.storage.uri} differs from what was written; "
                f"`midiscover features {self.sae_id} --force` makes it anew."
            )
        return pq.ParquetFile(io.BytesIO(data))

    def require(self, index: int) -> None:
        """NotFoundError for a number that no feature has."""
        if not 0 <= index < self.d_sae:
            raise NotFoundError(f"{self.sae_id} has no feature {index}; its features are 0 to {self.d_sae - 1}.")


def open_features(storage: Storage, sae_id: str, features_id: str | None = None) -> FeatureRecords:
    """The records of an SAE under one set of settings, or the newest. NotFoundError where there are none."""
    entries = storage.entries(layout.sae_file(sae_id, "features"))
    found = _manifests(storage, [entry.key for entry in entries])
    fits = [manifest for manifest in found if features_id in (None, manifest["features_id"])]
    if not fits:
        raise NotFoundError(f"The features of {sae_id} are not written down yet; run `midiscover features {sae_id}`.")
    manifest = max(fits, key=lambda manifest: (manifest["created"], manifest["features_id"]))
    within = layout.explanations_folder(sae_id, manifest["features_id"]) + "/"
    said = [(entry.key, entry.version) for entry in entries if entry.key.startswith(within)]
    return FeatureRecords(storage, manifest, said)


def _manifests(storage: Storage, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The manifests of all feature records of an SAE. CorruptError for one that can't be read."""
    found = []
    for key in keys:
        if key.endswith("/manifest.json"):
            try:
                manifest = json.loads(storage.read(key))
            except ValueError as error:
                raise CorruptError(f"{key} in {storage.uri} is not readable as JSON: {error}.") from None
            if manifest.get("v") != VERSION:
                raise CorruptError(f"{key} has version {manifest.get('v')}; this miDiscover reads {VERSION}.")
            found.append(manifest)
    return found


def _context(row: dict[str, Any]) -> Context:
    return Context(**{name: row[name] for name in Context._fields})


def _split(
    features: list[dict[str, Any]], contexts: dict[int, list[Context]], size: int
) -> tuple[list[dict[str, Any]], dict[int, list[Context]]]:
    """Take the first `size` features, and their contexts, out of both."""
    taken, features[:] = features[:size], features[size:]
    return taken, {row["index"]: contexts.pop(row["index"]) for row in taken}
