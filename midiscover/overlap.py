"""Text that occurs twice: hashes of every 32-token run, near-copies of documents, and runs that two splits share.

Numpy only; nothing is read or written here. A run is found by a 64-bit hash: of 500 million against 50 million
runs, one pair in a thousand such corpora meets by chance, which costs a window and hides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

RUN = 32
"""Tokens of a run; a power of two."""

CHUNK = 1 << 20
"""Tokens hashed at once."""

Hashes = NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def _mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection after which every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def run_hashes(ids: NDArray[np.integer]) -> Hashes:
    """Hashes of all runs ids[i : i + RUN], [max(0, n - RUN + 1)].

    A polynomial over mixed ids, doubled in length five times: hash_2s[i] = hash_s[i] * base^s + hash_s[i + s].
    """
    hashes = _mix(ids.astype(np.uint64) + np.uint64(_BASE))
    if len(ids) < RUN:
        return hashes[:0]
    length = 1
    while length < RUN:
        hashes = hashes[:-length] * np.uint64(pow(_BASE, length, _WORD + 1)) + hashes[length:]
        length *= 2
    return _mix(hashes)


def stream_hashes(pieces: Iterable[NDArray[np.integer]]) -> Iterator[Hashes]:
    """`run_hashes` of one stream that comes in pieces, in order, some CHUNK at a time."""
    tail = np.empty(0, np.int64)
    for piece in pieces:
        for start in range(0, len(piece), CHUNK):
            stretch = np.concatenate([tail, piece[start : start + CHUNK]])
            yield run_hashes(stretch)
            tail = stretch[-(RUN - 1) :]


def among(hashes: Hashes, ordered: Hashes) -> NDArray[np.bool_]:
    """Which of `hashes` occur in `ordered` (ascending, may repeat), as booleans of the shape of `hashes`."""
    if not len(ordered):
        return np.zeros(hashes.shape, bool)
    places = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    return ordered[places] == hashes


def shared_runs(ordered: Hashes, stream: Iterable[Hashes]) -> Hashes:
    """The hashes of `ordered` that occur in `stream`, ascending, each once."""
    found = [np.empty(0, np.uint64)]
    for hashes in stream:
        hashes = np.sort(hashes)  # ordered look-ups stay in the processor's cache
        found.append(np.unique(hashes[among(hashes, ordered)]))
    return np.unique(np.concatenate(found))


class NearCopies:
    """Recognises a document of which more than half of the runs stood in documents before it.

    Runs are sampled by their hash, so that a copy's sample is the original's. Memory is bounded: when `limit` sampled
    hashes are held, the sampling rate is halved and the hashes that it no longer covers are forgotten.
    """

    FEWEST = 4
    """Runs sampled of a document at least, the lowest ones: a short document has a sample as well."""

    def __init__(self, *, limit: int = 1 << 24, pending_limit: int = 1 << 20) -> None:
        self._limit = limit
        self._pending_limit = pending_limit
        self._shift = 3  # one run in 8
        self._known = np.empty(0, np.uint64)
        self._pending: set[int] = set()

    def is_copy(self, ids: NDArray[np.integer]) -> bool:
        """Whether the document `ids` [n] is a near-copy; where it is none, it is remembered."""
        sample = self._sample(ids)
        seen = among(sample, self._known)
        count = sum(bool(old) or int(run) in self._pending for run, old in zip(sample, seen, strict=True))
        if 2 * count > len(sample):
            return True
        self._pending.update(sample.tolist())
        if len(self._pending) >= self._pending_limit:
            self._settle()
        return False

    def _sample(self, ids: NDArray[np.integer]) -> Hashes:
        if len(ids) < RUN:  # one hash of the whole document, which no padded longer one can have by its length
            ids = np.concatenate([ids, np.full(RUN - len(ids), -1 - len(ids))])
        hashes = np.unique(run_hashes(ids))
        covered = int(np.searchsorted(hashes, np.uint64(_WORD >> self._shift), side="right"))
        return hashes[: max(covered, self.FEWEST)]

    def _settle(self) -> None:
        fresh = np.sort(np.fromiter(self._pending, np.uint64, len(self._pending)))
        fresh = fresh[~among(fresh, self._known)]
        self._known = np.insert(self._known, np.searchsorted(self._known, fresh), fresh)
        self._pending.clear()
        while len(self._known) > self._limit:
            self._shift += 1
            covered = int(np.searchsorted(self._known, np.uint64(_WORD >> self._shift), side="right"))
            self._known = self._known[:covered]
