"""A model whose words and judgement are known, and six features of a word each, on contexts made by hand."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from midiscover.errors import StageError
from midiscover.features.explain import (
    ExplainSettings,
    Passage,
    Reader,
)
from midiscover.features.explainer import Explainer
from midiscover.features.explanations import Explanations
from midiscover.features.quiet import Quiet
from midiscover.features.records import Context
from midiscover.store.storage import Storage, open_store
from tests.llm import answer

SETTINGS = ExplainSettings(shown=6, judged=6)
WORDS = ["rain", "sun", "wind", "snow", "fog", "hail"]


class Vocabulary:
    """A tokenizer of whole strings, in the order in which they came; `<s>` is special."""

    def __init__(self) -> None:
        self.strings = ["<s>"]
        self.all_special_ids = [0]

    def ids(self, tokens: Sequence[str]) -> list[int]:
        self.strings += [token for token in dict.fromkeys(tokens) if token not in self.strings]
        return [self.strings.index(token) for token in tokens]

    def __len__(self) -> int:
        return 10**6  # more are to come

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.strings[token]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self.strings[token] for token in ids)


VOCABULARY = Vocabulary()
READER = Reader(VOCABULARY)


class Scripted:
    """Answers as the stand-in for a server does, and fails when it is told to."""

    name, at_once = "scripted", 3

    def __init__(self, fails_after: int | None = None) -> None:
        self.identity: dict[str, str] = {}
        self.questions: list[str] = []
        self.fails_after = fails_after
        self._lock = threading.Lock()

    def answer(self, question: str) -> str:
        with self._lock:
            self.questions.append(question)
            if self.fails_after is not None and len(self.questions) > self.fails_after:
                raise StageError("gone")
        return answer(question)

    def which(self, about: str, claim: str, passages: Sequence[str]) -> list[bool | None]:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(passages, start=1))
        said = self.answer(f"{about}\n\nOf which is it true that {claim}?\n\n{listed}")
        return [one == "1" for one in said if one in "01"]

    @property
    def used(self) -> dict[str, int]:
        return {"questions": len(self.questions), "asked": 0, "answered": 0}


def context(kind: str, window: int, word: str, value: float, rank: int = 0) -> Context:
    tokens = [f" a{window}", f" {word}", f" b{window}", " c"]
    values = [0.0, value, 0.1 * value, 0.0]
    bins = (None, None, None) if kind == "random" else (0.0, value, 0.1)
    return Context(kind, rank, *bins, value, window, 1, 0, 0, VOCABULARY.ids(tokens), tokens, values)


def contexts(word: str, first: int = 0) -> list[Context]:
    """Ten of the highest and twelve of intervals; the first interval's windows are those of the highest."""
    found = [context("top", first + i, word, 9.0 - i / 10, i) for i in range(10)]
    found += [context("interval", first + i, word, 8.0 - i / 10, i) for i in range(2)]
    return [*found, *(context("interval", first + 20 + i, word, 5.0 - i / 4, i) for i in range(10))]


QUIET_TEXTS = [[" the", f" {word}", " was", f" q{number}"] for number in range(4) for word in WORDS]


class Records:
    """Six features, each of a word."""

    sae_id, features_id, d_sae = "sae", "f.test", 6

    def contexts(self, feature: int) -> list[Context]:
        return contexts(WORDS[feature], 100 * feature)

    def feature(self, feature: int) -> dict[str, Any]:
        return {"index": feature, "count": 9, "top_tokens": [f" {WORDS[feature]}"], "pos_tokens": []}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def quiet() -> Quiet:
    """Every word stands in four of 24 passages; its feature fires there."""
    fires = torch.tensor([[f" {word}" in tokens for word in WORDS] for tokens in QUIET_TEXTS])
    return Quiet([Passage(tokens, [0.0] * 4) for tokens in QUIET_TEXTS], fires)


def stored(storage: Storage, **settings: Any) -> Explanations:
    return Explanations(storage, "sae", "f.test", "scripted", settings)


def made(chat: Scripted, storage: Storage, quiet: Quiet | None, **given: Any) -> Explainer:
    records: Any = Records()
    held_out = None if quiet is None else lambda: quiet
    given = {"stored": stored(storage), "settings": SETTINGS, "reader": READER, "held_out": held_out, **given}
    return Explainer(chat=chat, records=records, **given)
