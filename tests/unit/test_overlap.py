"""Run hashes against tuples, and near-copies against the exact share of runs."""

from __future__ import annotations

import numpy as np
import pytest

from midiscover.overlap import CHUNK, RUN, NearCopies, among, run_hashes, shared_runs, stream_hashes


def runs(ids: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + RUN].tolist()) for i in range(len(ids) - RUN + 1)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_equal_hashes_are_equal_runs(rng: np.random.Generator) -> None:
    ids = np.tile(rng.integers(0, 3, 90), 8)  # few ids and a period: many equal runs, many that differ in one place
    ids[rng.integers(0, len(ids), 4)] += 1
    by_tuple = {}
    for run, value in zip(runs(ids), run_hashes(ids).tolist(), strict=True):
        assert by_tuple.setdefault(run, value) == value
    assert len(set(by_tuple.values())) == len(by_tuple) < len(ids) - RUN


@pytest.mark.parametrize("length", [0, 1, RUN - 1])
def test_short_streams_have_no_runs(length: int) -> None:
    assert run_hashes(np.zeros(length, np.int32)).tolist() == []


@pytest.mark.parametrize("cuts", [[], [1, 5, 6, 40, 41, 100], list(range(0, 300, 7))])
def test_pieces_of_a_stream_hash_like_the_whole(rng: np.random.Generator, cuts: list[int]) -> None:
    ids = rng.integers(0, 9, 300).astype(np.int32)
    pieces = np.concatenate([*stream_hashes(np.split(ids, cuts))])
    np.testing.assert_array_equal(pieces, run_hashes(ids))


def test_a_piece_longer_than_a_chunk(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 50_000, CHUNK + 100)
    np.testing.assert_array_equal(np.concatenate([*stream_hashes([ids])]), run_hashes(ids))


def test_shared_runs_are_the_intersection(rng: np.random.Generator) -> None:
    ours, theirs = rng.integers(0, 99, 500), rng.integers(0, 99, 500)
    theirs[100:150] = ours[30:80]
    found = shared_runs(np.sort(run_hashes(ours)), stream_hashes([theirs]))
    assert len(found) == len(set(runs(ours)) & set(runs(theirs))) == 50 - RUN + 1
    assert np.flatnonzero(among(run_hashes(ours), found)).tolist() == list(range(30, 80 - RUN + 1))


def test_documents_that_are_mostly_copied_are_found(rng: np.random.Generator) -> None:
    kept = rng.integers(0, 5000, 4000)
    copies, known = NearCopies(), set(runs(kept))
    assert not copies.is_copy(kept)
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        document = rng.integers(0, 5000, 1000)
        document[: int(share * 1000)] = kept[500 : 500 + int(share * 1000)]
        exact = np.mean([run in known for run in runs(document)])
        assert abs(exact - share) < 0.05
        assert copies.is_copy(document) == (exact > 0.5), share


def test_a_few_changed_words_make_no_new_document(rng: np.random.Generator) -> None:
    document = rng.integers(0, 5000, 2000)
    changed = document.copy()
    changed[::150] += 1
    copies = NearCopies()
    assert not copies.is_copy(document)
    assert copies.is_copy(changed)


def test_short_documents_are_compared_whole() -> None:
    copies = NearCopies()
    assert not copies.is_copy(np.array([1, 2, 3]))
    assert not copies.is_copy(np.array([1, 2]))
    assert not copies.is_copy(np.array([1, 2, 4]))
    assert copies.is_copy(np.array([1, 2, 3]))


def test_memory_is_bounded_and_long_copies_are_found_still(rng: np.random.Generator) -> None:
    copies = NearCopies(limit=500, pending_limit=100)
    documents = [rng.integers(0, 50_000, 3000) for _ in range(20)]
    assert not any(copies.is_copy(document) for document in documents)
    assert len(copies._known) <= 500
    assert len(copies._pending) < 1000
    assert all(copies.is_copy(document) for document in documents)
