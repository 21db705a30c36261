"""How much text a run has, before its corpus is made or after. Loads no torch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from midiscover.config import CorpusConfig
from midiscover.corpus import find_corpus
from midiscover.errors import ConfigError
from midiscover.resolve import Resolved
from midiscover.store.storage import Storage
from midiscover.texts import SourceIdentity, documents

CHARACTERS_PER_TOKEN = 4.2
"""Of a text whose corpus is not made yet."""


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
    held_out = round(tokens * corpus.held_out)
    return Work(tokens - held_out, held_out, exact=False)


def _tokens_of(source: SourceIdentity, corpus: CorpusConfig, samples: int) -> int:
    """About how many tokens the first documents have."""
    texts = itertools.chain.from_iterable(zip(*documents(corpus, source), strict=False))
    return round(sum(len(text) for text in itertools.islice(texts, samples)) / CHARACTERS_PER_TOKEN)
