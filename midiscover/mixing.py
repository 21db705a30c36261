"""Which documents make a corpus: parts mixed in equal shares of tokens, copies left out, limits, and the split.

Documents stream through; only samples of their runs stay in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from midiscover.config import CorpusConfig
from midiscover.overlap import NearCopies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Split = Literal["train", "held_out"]

BATCH_CHARACTERS = 1 << 18
"""Text tokenised at once."""


class Document(NamedTuple):
    """A document that is part of the corpus."""

    part: str
    split: Split
    characters: int
    """Of the text as it was read."""
    ids: NDArray[np.int32]
    """[tokens] without special tokens; cut where the corpus reached its last token."""


@dataclass(slots=True)
class Mixed:
    """What `mix` met so far."""

    read: int = 0
    copies: int = 0
    """Documents left out as near-copies of kept ones."""
    tokens: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    """Tokens taken from each part."""


def mix(
    parts: Mapping[str, Iterator[str]], cfg: CorpusConfig, tokenizer: PreTrainedTokenizerBase, counts: Mixed
) -> Iterator[Document]:
    """The documents of the corpus in order; `counts` is kept up to date.

    The next document comes from the part that has given the fewest tokens, so that shares are equal to within one
    document until a part ends. Stops at `max_samples` documents read or at exactly `max_tokens` tokens.
    """
    streams = {name: _tokenised(islice(texts, cfg.max_samples), tokenizer) for name, texts in parts.items()}
    given = counts.parts = dict.fromkeys(streams, 0)
    copies = NearCopies()
    for part, (text, ids) in in_turn(streams, given):
        counts.read += 1
        if len(ids) and copies.is_copy(ids):
            counts.copies += 1
        elif len(ids):
            if cfg.max_tokens is not None:
                ids = ids[: cfg.max_tokens - counts.tokens]
            given[part] += len(ids)
            counts.tokens += len(ids)
            yield Document(part, split_of(text, cfg), len(text), ids)
        if counts.read == cfg.max_samples or counts.tokens == cfg.max_tokens:
            return


def in_turn(streams: Mapping[str, Iterator[T]], given: Mapping[str, int]) -> Iterator[tuple[str, T]]:
    """What the streams hold, each with its part: the next is of the part that has given the fewest tokens so far.

    given: part -> tokens, which whoever takes them keeps up to date.
    """
    left = dict(streams)
    while left:
        part = min(left, key=lambda name: given[name])
        try:
            following = next(left[part])
        except StopIteration:
            del left[part]
            continue
        yield part, following


def split_of(text: str, cfg: CorpusConfig) -> Split:
    """The side of a document: a hash of its text and the seed against `held_out`, whatever else is in the corpus."""
    draw = hashlib.sha256(f"{cfg.seed}\n{text}".encode()).digest()
    return "held_out" if int.from_bytes(draw[:8]) < cfg.held_out * 2**64 else "train"


def prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by itself puts its BOS token in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _tokenised(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, NDArray[np.int32]]]:
    for batch in _batches(texts):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning that a document is longer than the model's context: it is cut into windows
        )
        for text, ids in zip(batch, encoded["input_ids"], strict=True):
            yield text, np.asarray(ids, np.int32)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
