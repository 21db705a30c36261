"""Interpreting and steering: /interpret, /steer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from midiscover.features.labels import label
from serve.context import Context, answered, as_json, context_of
from serve.exchange import Edit, Found, Query, SteerPiece, SteerRequest, TextAnswer
from serve.hosted import Hosted
from serve.problems import ProblemError
from serve.streams import events

router = APIRouter(tags=["interpret"])
Given = Annotated[Context, Depends(context_of)]
MOST_PROMPT = 16_384
"""Characters of a prompt or text; what is longer has too many tokens in any language."""
Text = Annotated[str, Field(min_length=1, max_length=MOST_PROMPT)]
SaeName = Annotated[str, Field(min_length=1, max_length=128, examples=["l15.mlp-down_proj"])]


class Strict(BaseModel):
    """Unknown members are an error, and numbers are not read from strings."""

    model_config = ConfigDict(extra="forbid", strict=True)


class InterpretRequest(Strict):
    """Texts, or a concept, and whom to ask."""

    text: Text | None = Field(None, examples=["The river ran past the old mill."])
    texts: list[Text] | None = None
    concept: str | None = Field(None, description="A module of `midiscover concepts`.", max_length=64)
    sae: SaeName | None = Field(None, description="An SAE by the beginning of its id; else the best one.")
    saes: list[SaeName] | None = None
    top_k: int = Field(10, ge=1, description="Features of each token, and of the text.")
    per_token: bool = True

    @model_validator(mode="after")
    def _one_of_each(self) -> InterpretRequest:
        given = [name for name in ("text", "texts", "concept") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of text, texts and concept")
        if self.sae is not None and self.saes is not None:
            raise ValueError("give sae or saes, not both")
        return self


class TokenFeature(BaseModel):
    """A feature on a token."""

    feature: int
    value: float


class TextFeature(BaseModel):
    """A feature in a text."""

    feature: int
    max: float
    position: int = Field(description="Of the token where it is highest.")
    mean: float = Field(description="Over all tokens, those where it is 0 included.")
    values: list[float] = Field(description="One for each token.")
    label: str | None = Field(description="What is known of it: where it peaks, and what it promotes.")


class SaeReading(BaseModel):
    """What one SAE sees in a text."""

    features: list[TextFeature] = Field(description="Those that fire, strongest first.")
    per_token: list[list[TokenFeature]] | None = Field(description="For each token, strongest first.")


class TextReading(BaseModel):
    """A text as its tokens, and what each SAE sees in it."""

    text: str
    tokens: list[str]
    saes: dict[str, SaeReading]


class InterpretAnswer(BaseModel):
    """The answer to texts, or to a concept."""

    model: str
    texts: list[TextReading] | None = None
    concept: dict[str, Any] | None = Field(
        None,
        description="SAE -> how its features tell the concept's texts from its controls, as `midiscover concepts`.",
    )


@router.post("/interpret", response_model=InterpretAnswer)
async def interpret(request: InterpretRequest, context: Given) -> Any:
    """Which features fire on texts, token by token; or which stand for a concept."""
    limits = context.config.limits
    if request.top_k > limits.top_k:
        raise ProblemError(422, f"top_k is {request.top_k}; at most {limits.top_k} are given at once.")
    saes = context.chosen(request.saes if request.saes is not None else [request.sae] if request.sae else [])
    name = saes[0].model_name
    if request.concept is not None:
        found = await context.model(saes[0]).concept(request.concept, [sae.id for sae in saes], request.top_k)
        return InterpretAnswer(model=name, texts=None, concept=answered(found))
    texts = request.texts if request.texts is not None else [request.text or ""]
    queries = [Query(sae=sae.id, k=request.top_k, per_token=request.per_token) for sae in saes]
    answers = await context.read(saes[0], texts, queries)
    labels = [await labels_of(context, sae, answers, place) for place, sae in enumerate(saes)]

    def readings() -> dict[str, Any]:
        rows = [
            {
                "text": text,
                "tokens": answer.tokens,
                "saes": {
                    sae.id: reading(answer, answer.found[place], labels[place], per_token=request.per_token)
                    for place, sae in enumerate(saes)
                },
            }
            for text, answer in zip(texts, answers, strict=True)
        ]
        return {"model": name, "texts": rows, "concept": None}

    return await as_json(readings)


def reading(answer: TextAnswer, found: Found, labels: dict[int, str], *, per_token: bool) -> dict[str, Any]:
    """Arrays as the members of `SaeReading`, plain: a pydantic object for each of 100,000 numbers takes seconds."""
    rows: list[list[dict[str, Any]]] = [[] for _ in answer.tokens]
    if per_token:
        for token, feature, value in zip(
            found.token.tolist(), found.feature.tolist(), found.value.tolist(), strict=True
        ):
            rows[token].append({"feature": feature, "value": value})
    features = [
        {
            "feature": feature,
            "max": max(values),
            "position": values.index(max(values)),
            "mean": mean,
            "values": values,
            "label": labels.get(feature),
        }
        for feature, values, mean in zip(
            found.strongest.tolist(), found.values.tolist(), found.mean.tolist(), strict=True
        )
    ]
    return {"features": features, "per_token": rows if per_token else None}


async def labels_of(context: Context, sae: Hosted, answers: Sequence[TextAnswer], place: int) -> dict[int, str]:
    """Labels of the features that answers name; none where the features are not written down."""
    wanted = {feature for answer in answers for feature in answer.found[place].strongest.tolist()}
    try:
        rows = await context.rows(sae)
    except ProblemError:
        return {}
    return {feature: label(rows[feature]) for feature in wanted if feature < len(rows)}


class SteerEdit(Strict):
    """A change of one feature."""

    sae: SaeName | None = Field(None, description="By the beginning of its id; else the best one.")
    feature: int = Field(ge=0)
    mode: Literal["add", "clamp", "ablate"] = "add"
    value: float = Field(
        0.0,
        ge=-1e6,
        le=1e6,
        description="add: times the feature's decoder direction; clamp: the activation it is held at.",
    )


class SteerBody(Strict):
    """Text to go on from, with and without changes."""

    prompt: Text = Field(examples=["The river"])
    features: list[SteerEdit] = Field(min_length=1, max_length=32)
    max_new_tokens: int = Field(40, ge=1)
    temperature: float = Field(0.0, ge=0, le=2, description="0: always the likeliest token.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int = Field(0, ge=0, lt=2**63)
    stream: bool = Field(False, description="Server-sent events, each with the text of both sides so far.")


class SteerAnswer(BaseModel):
    """What was generated after the prompt."""

    steered: str
    default: str
    done: bool = True


@router.post(
    "/steer",
    response_model=SteerAnswer,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The texts; a stream where asked for."}},
)
async def steer(body: SteerBody, context: Given) -> Any:
    """Generate with features added, clamped or ablated, beside the same without."""
    limits = context.config.limits
    if body.max_new_tokens > limits.new_tokens:
        raise ProblemError(422, f"max_new_tokens is {body.max_new_tokens}; at most {limits.new_tokens} are made.")
    names = [edit.sae for edit in body.features if edit.sae]
    saes = {name: context.hosted(name) for name in names}
    default = context.chosen([])[0] if len(names) < len(body.features) else None
    edited = [saes[edit.sae] if edit.sae else default for edit in body.features]
    context.chosen([sae.id for sae in edited if sae is not None])  # all of one language model
    request = SteerRequest(
        prompt=body.prompt,
        edits=tuple(
            Edit(sae.id, edit.feature, edit.mode, edit.value)
            for edit, sae in zip(body.features, edited, strict=True)
            if sae is not None
        ),
        new_tokens=body.max_new_tokens,
        temperature=body.temperature,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
    )
    first = next(sae for sae in edited if sae is not None)
    pieces = context.model(first).steer(request)
    if body.stream:
        return StreamingResponse(events(await started(pieces), steered_event), media_type="text/event-stream")
    last = await last_piece(pieces)
    return SteerAnswer(steered=last.texts["steered"], default=last.texts["default"])


def steered_event(piece: SteerPiece) -> dict[str, Any]:
    """A piece as its event."""
    return {**piece.texts, "done": piece.done}


async def last_piece(pieces: AsyncIterator[Any]) -> SteerPiece:
    """The whole text."""
    last: SteerPiece | None = None
    async for piece in pieces:
        last = answered(piece)
    if last is None:
        raise ProblemError(503, "Nothing was generated; try again.")
    return last


async def started(pieces: AsyncIterator[Any]) -> AsyncIterator[SteerPiece]:
    """The stream once its first piece is there: until then a problem can still be the answer."""
    first = answered(await anext(pieces))

    async def rest() -> AsyncIterator[SteerPiece]:
        yield first
        async for piece in pieces:
            yield answered(piece)

    return rest()
