"""Packing and the separation of splits, each against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from midiscover.overlap import RUN
from midiscover.packing import DOC_BOS, DOC_PADDING, Layout, Packer, Windows, apart_from_training

BOS, EOS, PAD = 1, 2, 0


def layout(context_size: int, *, bos: bool = False, eos: bool = True) -> Layout:
    return Layout(context_size=context_size, bos_id=BOS if bos else None, eos_id=EOS if eos else None, pad_id=PAD)


def naive(documents: list[np.ndarray], shape: Layout) -> tuple[list[list[int]], list[list[int]]]:
    """Token by token."""
    stream: list[tuple[int, int]] = []
    for index, document in enumerate(documents):
        if index and shape.eos_id is not None:
            stream.append((shape.eos_id, index - 1))
        stream += [(int(token), index) for token in document]
    ids, doc = [], []
    while stream:
        row, stream = stream[: shape.width], stream[shape.width :]
        row += [(PAD, DOC_PADDING)] * (shape.width - len(row))
        row = ([(BOS, DOC_BOS)] if shape.bos_id is not None else []) + row
        ids.append([token for token, _ in row])
        doc.append([index for _, index in row])
    return ids, doc


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("multiple_of", [1, 3])
def test_packing_equals_the_naive_loop(bos: bool, eos: bool, multiple_of: int) -> None:
    rng = np.random.default_rng(1)
    shape = layout(16, bos=bos, eos=eos)
    lengths = [1, 15, 16, 17, 100, 14, 1, 1, 32, 30, 5]
    documents = [rng.integers(3, 99, length).astype(np.int32) for length in lengths]
    packer, given, starts = Packer(shape), [], []
    for index, document in enumerate(documents):
        starts.append(packer.add(index, document))
        given.append(packer.take(multiple_of=multiple_of))
    given.append(packer.take(rest=True))
    assert packer.take(rest=True) is None
    windows = [piece for piece in given if piece is not None]
    assert all(len(piece.ids) % multiple_of == 0 for piece in windows[:-1])
    ids, doc = naive(documents, shape)
    assert np.concatenate([piece.ids for piece in windows]).tolist() == ids
    assert np.concatenate([piece.doc for piece in windows]).tolist() == doc
    for index, (start, document) in enumerate(zip(starts, documents, strict=True)):
        place = doc[start].index(index)
        assert ids[start][place] == document[0]
        assert not any(index in row for row in doc[:start])


def test_content_is_what_went_in() -> None:
    shape = layout(8, bos=True)
    windows = shape.windows(np.arange(10, 30, dtype=np.int32), np.zeros(20, np.int32))
    assert windows.ids.shape == (3, 8)
    assert windows.ids.dtype == windows.doc.dtype == np.int32
    assert windows.content().tolist() == list(range(10, 30))


def tuples(stream: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(stream[i : i + RUN].tolist()) for i in range(len(stream) - RUN + 1)}


@pytest.mark.parametrize("context_size", [8, 48])
@pytest.mark.parametrize("bos", [False, True])
def test_windows_that_touch_a_shared_run_go(context_size: int, bos: bool) -> None:
    rng = np.random.default_rng(2)
    shape = layout(context_size, bos=bos)
    training = rng.integers(3, 500, 3000).astype(np.int32)
    stream = rng.integers(3, 500, 1000).astype(np.int32)
    stream[5:36] = training[5:36]  # 31 tokens: no run of 32
    for place, length in ((100, 32), (400, 60), (700, 33)):
        stream[place : place + length] = training[place : place + length]
    held_out = shape.windows(stream, np.zeros(len(stream), np.int32))
    apart = apart_from_training(held_out, np.split(training, [10, 700, 720]), shape)

    known, touched = tuples(training), set()
    for start in range(len(stream) - RUN + 1):
        if tuple(stream[start : start + RUN].tolist()) in known:
            touched |= {position // shape.width for position in range(start, start + RUN)}
    assert touched
    assert np.flatnonzero(~apart.keep).tolist() == sorted(touched)
    assert apart.left == 0
    for first in np.flatnonzero(apart.keep):  # also across every border that is left
        stretch = np.arange(first, first + 6)
        stretch = stretch[: np.argmin(np.append(stretch < len(apart.keep), False))]
        stretch = stretch[np.cumprod(apart.keep[stretch]).astype(bool)]
        assert known.isdisjoint(tuples(Windows(held_out.ids[stretch], held_out.doc[stretch]).content()))


def test_padding_and_bos_are_no_part_of_a_run() -> None:
    shape = layout(32, bos=True)
    pad = np.full(64, PAD, np.int32)
    held_out = shape.windows(np.arange(3, 10, dtype=np.int32), np.zeros(7, np.int32))
    assert apart_from_training(held_out, [pad, held_out.ids.ravel()], shape).keep.tolist() == [True]
