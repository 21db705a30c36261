"""Documents end to end in windows of equal length: pure numpy, no tokenizer and no store.

A stream of content is document, EOS, document, EOS, ... document; it is cut every `width` tokens, where `width` is
the context size, less one where each window starts with a BOS token of ours. Only the last window is padded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from midiscover.overlap import RUN, among, shared_runs, stream_hashes

DOC_PADDING = -1
DOC_BOS = -2

Ints = NDArray[np.int32]


class Windows(NamedTuple):
    """Token windows, and the document that each token came from."""

    ids: Ints
    """[n, context_size] token ids."""
    doc: Ints
    """[n, context_size] document indices; -1 padding, -2 a BOS token put in front by us. An EOS token between two
    documents belongs to the one before it."""

    def content(self) -> Ints:
        """The stream that was cut: ids without our BOS tokens and without padding, [tokens]."""
        return self.ids[self.doc >= 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The shape of windows and the special tokens in them."""

    context_size: int
    bos_id: int | None
    """Stands in front of each window; None where nothing does."""
    eos_id: int | None
    """Stands between two documents; None where the tokenizer has none."""
    pad_id: int

    @property
    def width(self) -> int:
        """Content tokens of a window."""
        return self.context_size - (self.bos_id is not None)

    def windows(self, ids: Ints, doc: Ints) -> Windows:
        """Content `ids` and `doc` [tokens] as windows; the last one is padded where it is not full."""
        rows = -(-len(ids) // self.width)
        missing = rows * self.width - len(ids)
        ids = np.pad(ids, (0, missing), constant_values=self.pad_id).reshape(rows, self.width)
        doc = np.pad(doc, (0, missing), constant_values=DOC_PADDING).reshape(rows, self.width)
        if self.bos_id is not None:
            ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=self.bos_id)
            doc = np.pad(doc, ((0, 0), (1, 0)), constant_values=DOC_BOS)
        return Windows(ids.astype(np.int32), doc.astype(np.int32))


class Packer:
    """Collects documents, gives out full windows, and keeps what does not fill one."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._ids: list[Ints] = []
        self._doc: list[Ints] = []
        self._held = 0
        self._given = 0
        self._last_doc: int | None = None

    def add(self, index: int, ids: Ints) -> int:
        """Append document `index`; returns the window in which it starts."""
        if self._last_doc is not None and self.layout.eos_id is not None:
            self._append(np.array([self.layout.eos_id], np.int32), self._last_doc)
        start = self._given + self._held // self.layout.width
        self._append(ids, index)
        self._last_doc = index
        return start

    def take(self, *, multiple_of: int = 1, rest: bool = False) -> Windows | None:
        """The full windows that are not given out yet, so many that their number is a multiple of `multiple_of`; with
        `rest` all of them and the last, padded one. None where there is nothing to give."""
        full = self._held // self.layout.width // multiple_of * multiple_of
        if not (self._held if rest else full):
            return None
        ids, doc = np.concatenate(self._ids), np.concatenate(self._doc)
        end = len(ids) if rest else full * self.layout.width
        self._ids, self._doc, self._held = [ids[end:]], [doc[end:]], len(ids) - end
        self._given += full
        return self.layout.windows(ids[:end], doc[:end])

    def _append(self, ids: Ints, index: int) -> None:
        self._ids.append(ids)
        self._doc.append(np.full(len(ids), index, np.int32))
        self._held += len(ids)


class Apart(NamedTuple):
    """Which held-out windows may stay."""

    keep: NDArray[np.bool_]
    """[n] windows that share no run with training."""
    left: int
    """Runs of the kept windows that occur in training, counted anew from the kept windows: 0."""


def apart_from_training(held_out: Windows, training: Iterable[Ints], layout: Layout) -> Apart:
    """Find the held-out windows that touch a run of 32 tokens which `training` (content, piece by piece) holds.

    Both are compared as the streams they were cut from, so that a run across the border of two windows counts, and
    costs both. Takes 20 bytes of memory for each held-out token.
    """
    content, width = held_out.content(), layout.width
    runs = np.concatenate([*stream_hashes([content]), np.empty(0, np.uint64)])
    runs.sort()
    shared = shared_runs(runs, stream_hashes(training))
    del runs
    touched, start = np.zeros(len(held_out.ids) + 1, np.int64), 0
    for hashes in stream_hashes([content]):
        places = start + np.flatnonzero(among(hashes, shared))
        np.add.at(touched, places // width, 1)
        np.add.at(touched, (places + RUN - 1) // width + 1, -1)
        start += len(hashes)
    keep = np.cumsum(touched[:-1]) == 0
    kept = np.flatnonzero(keep)
    stretches = np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)
    left = 0
    for stretch in stretches:
        stream = Windows(held_out.ids[stretch], held_out.doc[stretch]).content()
        left += sum(int(among(hashes, shared).sum()) for hashes in stream_hashes([stream]))
    return Apart(keep, left)
