"""Steering as Neuronpedia asks for it: /v1/steer/... as its inference server, /api/steer... as its web application."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, StrictStr

from serve.api import MOST_PROMPT, last_piece, started
from serve.context import Context, context_of
from serve.exchange import Edit, SteerPiece, SteerRequest
from serve.hosted import Hosted
from serve.neuronpedia import Name, Prompt, Seed, Wire, number, source, twice
from serve.problems import ProblemError
from serve.streams import events

inference = APIRouter(prefix="/v1", tags=["neuronpedia inference"])
application = APIRouter(prefix="/api", tags=["neuronpedia web"])
Given = Annotated[Context, Depends(context_of)]
STREAMED: dict[str, Any] = {
    "response_model": None,
    "responses": {200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The texts."}},
}
"""Of a route that answers with texts, or with a stream of them."""


class SteerFeature(Wire):
    """A feature to add."""

    model: Name
    source: Name
    index: int = Field(ge=0)
    strength: float = Field(ge=-1e6, le=1e6)


class Steered(Wire):
    """What is generated with and without added features."""

    model: Name
    steer_method: Literal["SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP"] = "SIMPLE_ADDITIVE"
    normalize_steering: bool = False
    types: list[Literal["STEERED", "DEFAULT"]] = Field(min_length=1, max_length=2)
    features: list[SteerFeature] = Field(min_length=1, max_length=32)
    n_completion_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0, le=2)
    strength_multiplier: float = Field(ge=-100, le=100)
    freq_penalty: float = Field(0.0, ge=-2, le=2)
    seed: Seed = 0
    stream: bool = False


class Completion(Steered):
    """Text to go on from."""

    prompt: Prompt


class Turn(BaseModel):
    """Of a conversation."""

    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: Annotated[StrictStr, Field(max_length=MOST_PROMPT)]


Turns = Annotated[list[Turn], Field(min_length=1, max_length=64)]


class Chat(Steered):
    """A conversation to answer."""

    prompt: Turns
    steer_special_tokens: bool = True


def steering(request: Completion | Chat, context: Context) -> tuple[Hosted, SteerRequest]:
    """The request in our own terms. With normalizeSteering a direction has norm 1, which ours have already."""
    limit = context.config.limits.new_tokens
    if request.n_completion_tokens > limit:
        raise ProblemError(422, f"nCompletionTokens is {request.n_completion_tokens}; at most {limit} are made.")
    edits, saes = [], []
    for feature in request.features:
        saes.append(source(context, feature.model, feature.source))
        edits.append(Edit(saes[-1].id, feature.index, "add", feature.strength * request.strength_multiplier))
    context.chosen([sae.id for sae in saes])  # all of one language model
    sides: dict[str, Literal["steered", "default"]] = {"STEERED": "steered", "DEFAULT": "default"}
    chat = isinstance(request, Chat)
    return saes[0], SteerRequest(
        prompt="" if chat else request.prompt,
        messages=tuple(turn.model_dump() for turn in request.prompt) if chat else (),
        steer_special=not chat or request.steer_special_tokens,
        edits=tuple(edits),
        sides=tuple(sides[side] for side in dict.fromkeys(request.types)),
        new_tokens=request.n_completion_tokens,
        temperature=request.temperature,
        frequency_penalty=request.freq_penalty,
        seed=request.seed,
        method="orthogonal" if request.steer_method == "ORTHOGONAL_DECOMP" else "add",
        front="none" if chat else "bos",  # a chat template writes its own beginning
    )


def outputs(piece: SteerPiece, sides: Sequence[str]) -> dict[str, Any]:
    """What was generated, the prompt not included."""
    return {"outputs": [{"type": side, "output": piece.texts[side.lower()]} for side in sides]}


def chat_outputs(request: Chat, piece: SteerPiece, sides: Sequence[str]) -> dict[str, Any]:
    """The conversations with their answers, as turns and as the model reads them; and the one that was given."""
    given = [turn.model_dump() for turn in request.prompt]
    made = [{"type": side, **answered_chat(given, piece, side.lower())} for side in sides]
    return {"outputs": made, "input": {"chatTemplate": given, "raw": piece.prompt}}


def answered_chat(given: Sequence[dict[str, str]], piece: SteerPiece, side: str) -> dict[str, Any]:
    """One conversation with its answer."""
    answer = piece.texts[side]
    return {"chatTemplate": [*given, {"role": "assistant", "content": answer}], "raw": piece.prompt + answer}


async def generated(request: Completion | Chat, context: Context, shown: Callable[[SteerPiece, list[str]], Any]) -> Any:
    """The answer to a request, or a stream of what there is so far, as `shown` puts it."""
    sae, asked_of = steering(request, context)
    pieces = context.model(sae).steer(asked_of)
    sides: list[str] = list(dict.fromkeys(request.types))
    if request.stream:
        frames = events(await started(pieces), lambda piece: shown(piece, sides))
        return StreamingResponse(frames, media_type="text/event-stream")
    return shown(await last_piece(pieces), sides)


@inference.post("/steer/completion", **STREAMED)
async def steer_completion(request: Completion, context: Given) -> Any:
    """Generate with features added and without; a stream of the whole text so far where asked for."""
    return await generated(request, context, outputs)


@inference.post("/steer/completion-chat", **STREAMED)
async def steer_chat(request: Chat, context: Given) -> Any:
    """Answer a conversation with features added and without; streamed where asked for."""
    return await generated(request, context, partial(chat_outputs, request))


class WebSteerFeature(Wire):
    """A feature to add."""

    model_id: Name
    layer: Name
    index: int | StrictStr
    strength: float = Field(ge=-1e6, le=1e6)


class WebSteered(Wire):
    """What is generated with features added and without."""

    model_id: Name
    features: list[WebSteerFeature] = Field(min_length=1, max_length=32)
    temperature: float = Field(0.5, ge=0, le=2)
    n_tokens: int = Field(32, ge=1, le=256, alias="n_tokens")
    freq_penalty: float = Field(0.0, ge=-2, le=2, alias="freq_penalty")
    seed: Seed = 16
    strength_multiplier: float = Field(1.0, ge=0, le=10, alias="strength_multiplier")
    steer_method: str = Field("SIMPLE_ADDITIVE", alias="steer_method", pattern="^(SIMPLE_ADDITIVE|ORTHOGONAL_DECOMP)$")

    def as_v1(self) -> dict[str, Any]:
        """The same in the words of the inference server."""
        features = [
            SteerFeature(model=one.model_id, source=one.layer, index=number(one.index), strength=one.strength)
            for one in self.features
        ]
        return {
            "model": self.model_id,
            "steer_method": "ORTHOGONAL_DECOMP" if self.steer_method == "ORTHOGONAL_DECOMP" else "SIMPLE_ADDITIVE",
            "features": features,
            "n_completion_tokens": self.n_tokens,
            "temperature": self.temperature,
            "strength_multiplier": self.strength_multiplier,
            "freq_penalty": self.freq_penalty,
            "seed": self.seed,
        }


class WebSteer(WebSteered):
    """Text to go on from."""

    prompt: Annotated[StrictStr, Field(min_length=1, max_length=2048)]
    stream: bool = False


class WebChat(WebSteered):
    """Conversations to answer: each side has its own."""

    default_chat_messages: Turns
    steered_chat_messages: Turns
    steer_special_tokens: bool = Field(True, alias="steer_special_tokens")


NOT_KEPT = {"id": None, "shareUrl": None, "limit": None}


@twice(application, "/steer", **STREAMED)
async def web_steer(request: WebSteer, context: Given) -> Any:
    """Generate with features added and without; a stream of the whole text so far where asked for."""
    completion = Completion(
        prompt=request.prompt, types=["STEERED", "DEFAULT"], stream=request.stream, **request.as_v1()
    )

    def shown(piece: SteerPiece, sides: Sequence[str]) -> dict[str, Any]:
        # With the prompt in front, as the web application shows it.
        both = {side: request.prompt + piece.texts[side.lower()] for side in sides}
        return both | {"steeredLogProbs": None, "defaultLogProbs": None} | NOT_KEPT

    return await generated(completion, context, shown)


@twice(application, "/steer-chat")
async def web_steer_chat(request: WebChat, context: Given) -> dict[str, Any]:
    """Answer conversations, one with features added and one without."""
    found: dict[str, Any] = {}
    for side, turns in (("STEERED", request.steered_chat_messages), ("DEFAULT", request.default_chat_messages)):
        chat = Chat.model_validate(
            {"prompt": turns, "types": [side], "steer_special_tokens": request.steer_special_tokens, **request.as_v1()}
        )
        sae, asked_of = steering(chat, context)
        piece = await last_piece(context.model(sae).steer(asked_of))
        found[side] = answered_chat([turn.model_dump() for turn in turns], piece, side.lower())
    return found | NOT_KEPT
