"""What ingress and interpreter say to each other. Plain values and arrays: no tensor, no dense code.

An interpreter answers wrong input with a `Problem` instead of raising: exceptions that cross Ray arrive as tracebacks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ints, Floats = NDArray[np.int32], NDArray[np.float32]

Front = Literal["corpus", "bos", "none"]
"""The token put before a text: what stands there in a corpus (its row is left out), BOS unless the text begins with it
(its row is kept, as Neuronpedia does), or none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What is asked of one SAE, or of one direction, about each text."""

    sae: str = ""
    """Its id; empty where `vector` is given."""
    kind: Literal["top", "active", "values"] = "top"
    """The strongest features of each token and of the text, all features that fire, or the values of some features."""
    k: int = 10
    """Features of each token, and of the text."""
    per_token: bool = True
    per_text: bool = True
    features: tuple[int, ...] = ()
    """Of kind `values`."""
    rank_at: tuple[int, ...] = ()
    """Rank the text's features by the sum over these tokens instead of by the maximum."""
    skip_first: bool = False
    """Count the first row as 0 everywhere where it is BOS."""
    hook: str = ""
    vector: tuple[float, ...] = ()
    """A direction at `hook`, whose dot products with the activations are the only feature."""

    def numbers(self, tokens: int) -> int:
        """Activations that the answer about so many tokens may hold; 0 for `active`, which only the pass can tell."""
        if self.kind == "active":
            return 0
        if self.kind == "values":
            return tokens * max(1, len(self.features))
        return tokens * self.k * (self.per_text + self.per_token)


class Found(NamedTuple):
    """The answer to a query about a text of t tokens."""

    token: Ints
    feature: Ints
    value: Floats
    """Entries (token, feature, value), by token, highest first; empty where not asked for."""
    strongest: Ints
    """[m] features of the text, highest first, or those asked for."""
    values: Floats
    """[m, t] of them."""
    mean: Floats
    """[m] over all tokens."""


class TextAnswer(NamedTuple):
    """A text as its tokens, and what was found for each query."""

    token_ids: list[int]
    tokens: list[str]
    special: list[bool]
    has_bos: bool
    """Whether the first token is BOS; it is not where `front` is "bos" and the tokenizer has none."""
    found: list[Found]


class Problem(NamedTuple):
    """Why there is no answer."""

    status: int
    detail: str


class Edit(NamedTuple):
    """A change of one feature while text is generated."""

    sae: str
    feature: int
    mode: Literal["add", "clamp", "ablate"]
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SteerRequest:
    """Text to go on from, with and without changes."""

    prompt: str
    edits: tuple[Edit, ...]
    messages: tuple[dict[str, str], ...] = ()
    """A conversation to answer, `role` and `content` of each turn, instead of `prompt`."""
    steer_special: bool = True
    """Change something at special tokens too."""
    sides: tuple[Literal["steered", "default"], ...] = ("steered", "default")
    new_tokens: int = 40
    temperature: float = 0.0
    """0: always the likeliest token."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that it was generated."""
    seed: int = 0
    method: Literal["add", "orthogonal"] = "add"
    """`orthogonal`: what the activations have in an added direction is taken out first."""
    front: Front = "corpus"


class SteerPiece(NamedTuple):
    """The text so far of each side; sent after each token."""

    texts: dict[str, str]
    done: bool
    prompt: str = ""
    """What was gone on from, as the model read it."""


class Model(Protocol):
    """An interpreter as the ingress sees it: in this process, or a replica somewhere else."""

    async def read(self, texts: Sequence[str], queries: Sequence[Query], front: Front) -> list[TextAnswer] | Problem:
        """Answer all queries about each text."""
        ...

    async def concept(self, name: str, saes: Sequence[str], top: int) -> dict[str, Any] | Problem:
        """How features of the SAEs tell the texts of a module from its controls."""
        ...

    async def tokenise(self, text: str, front: Front) -> TextAnswer | Problem:
        """The tokens alone."""
        ...

    async def direction(self, sae: str, feature: int, which: Literal["encoder", "decoder"]) -> list[float] | Problem:
        """A feature's column of W_enc or row of W_dec."""
        ...

    async def nearest(self, sae: str, vector: Sequence[float] | int, top: int) -> list[tuple[int, float]] | Problem:
        """Features whose decoder directions are nearest to a vector, or to those of a feature, by cosine."""
        ...

    def steer(self, request: SteerRequest) -> AsyncIterator[SteerPiece | Problem]:
        """Generate, token by token."""
        ...

    async def facts(self) -> dict[str, Any]:
        """What it holds and has done, for /metrics and /v1/capabilities."""
        ...
