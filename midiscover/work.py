"""How much text a run has, before its corpus is made or after. Loads no torch."""

from __future__ import annotations

import itertools
import sys
from typing import NamedTuple

from midiscover.builtin_text import PARTS
from midiscover.config import CorpusConfig
from midiscover.corpus import find_corpus
from midiscover.errors import ConfigError
from midiscover.mixing import Split, in_turn, split_of
from midiscover.resolve import Resolved
from midiscover.store.storage import Storage
from midiscover.text_files import find
from midiscover.texts import SourceIdentity, documents

CHARACTERS_PER_TOKEN = 4.2
"""Of a text whose corpus is not made yet."""
READ_BELOW = 1_000_000
"""Tokens up to which a text on this machine is read, to see how it splits; the built-in ones are read to their end."""
PACKED = 4
"""Characters that are taken to lie in a byte of a compressed file."""


class Work(NamedTuple):
    """How much text there is."""

    train: int
    """Tokens."""
    held_out: int
    exact: bool
    """Of a corpus that stands; else by the settings."""


def work_of(resolved: Resolved, storage: Storage | None) -> Work:
    """Tokens of a run's corpus: of the one that stands, else what its settings let through of what there is.

    ConfigError where only reading the whole text would tell.
    """
    found = None if storage is None else find_corpus(storage, resolved.corpus_id)
    if found is not None:
        return Work(found.tokens["train"], found.tokens["held_out"], exact=True)
    corpus = resolved.config.corpus
    tokens = corpus.max_tokens
    if corpus.max_samples is not None or corpus.source in PARTS or find(corpus.source) is not None:
        # How long documents are shows only when they are read; a text on this machine is so at its beginning.
        until = READ_BELOW if corpus.max_samples is None and corpus.source not in PARTS else sys.maxsize
        by_split = _by_split(resolved.source, corpus, min(until, tokens or sys.maxsize))
        read = sum(by_split.values())
        if read < until or read == tokens:
            return Work(by_split["train"], by_split["held_out"], exact=False)
        tokens = tokens and max(read, min(tokens, _room(corpus.source)))
    if tokens is None:
        raise ConfigError(
            "How long the text is shows only when it is read; give corpus.max_tokens (or max_samples), or run "
            "`midiscover harvest` first."
        )
    held_out = round(tokens * corpus.held_out)
    return Work(tokens - held_out, held_out, exact=False)


def _room(source: str) -> int:
    """About how many tokens files have room for; no limit is known of those in a bucket."""
    characters = 0
    for file in find(source) or []:
        if file.path is None:
            return sys.maxsize
        characters += file.path.stat().st_size * (PACKED if file.name.endswith((".gz", ".parquet")) else 1)
    return round(characters / CHARACTERS_PER_TOKEN)


def _by_split(source: SourceIdentity, corpus: CorpusConfig, most: int) -> dict[Split, int]:
    """About how many tokens each split gets of the first `most` of a text, or of as many documents as are asked for.

    Documents are chosen as `mix` does: of few, either split may get most.
    """
    parts = dict(zip(source.parts, documents(corpus, source), strict=True))
    given = dict.fromkeys(parts, 0)
    found: dict[Split, int] = {"train": 0, "held_out": 0}
    for part, text in itertools.islice(in_turn(parts, given), corpus.max_samples):
        length = min(most - sum(found.values()), round(len(text) / CHARACTERS_PER_TOKEN))
        given[part] += length
        found[split_of(text, corpus)] += length
        if sum(found.values()) == most:
            break
    return found
