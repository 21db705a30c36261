"""How much text a run has, before its corpus is made or after. Loads no torch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from midiscover.builtin_text import PARTS
from midiscover.config import CorpusConfig
from midiscover.corpus import find_corpus
from midiscover.errors import ConfigError
from midiscover.mixing import Split, split_of
from midiscover.resolve import Resolved
from midiscover.store.storage import Storage
from midiscover.text_files import find
from midiscover.texts import SourceIdentity, documents

CHARACTERS_PER_TOKEN = 4.2
"""Of a text whose corpus is not made yet."""
READ_BELOW = 1_000_000
"""Tokens up to which a text on this machine is read, to see how it splits."""


class Work(NamedTuple):
    """How much text there is."""

    train: int
    """Tokens."""
    held_out: int
    exact: bool
    """Of a corpus that stands; else by the settings."""


def work_of(resolved: Resolved, storage: Storage | None) -> Work:
    """Tokens of a run's corpus: of the one that stands, else what its settings let through.

    ConfigError where only reading the whole text would tell.
    """
    found = None if storage is None else find_corpus(storage, resolved.corpus_id)
    if found is not None:
        return Work(found.tokens["train"], found.tokens["held_out"], exact=True)
    corpus = resolved.config.corpus
    tokens = corpus.max_tokens
    if corpus.max_samples is not None:
        sampled = _tokens_of(resolved.source, corpus, corpus.max_samples)
        tokens = sampled if tokens is None else min(tokens, sampled)
    if tokens is None:
        raise ConfigError(
            "How long the text is shows only when it is read; give corpus.max_tokens (or max_samples), or run "
            "`midiscover harvest` first."
        )
    if tokens <= READ_BELOW and (corpus.source in PARTS or find(corpus.source) is not None):
        found = _by_split(resolved.source, corpus, tokens)
        return Work(found["train"], found["held_out"], exact=False)
    held_out = round(tokens * corpus.held_out)
    return Work(tokens - held_out, held_out, exact=False)


def _by_split(source: SourceIdentity, corpus: CorpusConfig, tokens: int) -> dict[Split, int]:
    """About how many tokens of a text each split gets, chosen as `mix` does: of few documents either may get most."""
    parts = dict(zip(source.parts, documents(corpus, source), strict=True))
    given = dict.fromkeys(parts, 0)
    found: dict[Split, int] = {"train": 0, "held_out": 0}
    while parts and tokens > 0:
        part = min(parts, key=lambda name: given[name])
        text = next(parts[part], None)
        if text is None:
            del parts[part]
            continue
        length = min(tokens, round(len(text) / CHARACTERS_PER_TOKEN))
        given[part] += length
        found[split_of(text, corpus)] += length
        tokens -= length
    return found


def _tokens_of(source: SourceIdentity, corpus: CorpusConfig, samples: int) -> int:
    """About how many tokens the first documents have."""
    texts = itertools.chain.from_iterable(zip(*documents(corpus, source), strict=False))
    return round(sum(len(text) for text in itertools.islice(texts, samples)) / CHARACTERS_PER_TOKEN)
