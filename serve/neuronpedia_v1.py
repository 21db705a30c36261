"""Neuronpedia's inference server, /v1/...: the same requests and answers; its clients need only another address.

What differs: SAEs on the output of an MLP can be steered here, and a key is needed everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field, StrictStr

from serve.context import Context, answered, as_json, context_of
from serve.exchange import Query
from serve.neuronpedia import (
    INDEX,
    NO_DFA,
    All,
    Name,
    Prompt,
    TopkByToken,
    Vector,
    Wire,
    active,
    by_token,
    peak,
    reader_of,
    single,
    source,
    strongest,
    tokens,
)
from serve.problems import ProblemError

router = APIRouter(prefix="/v1", tags=["neuronpedia inference"])
Given = Annotated[Context, Depends(context_of)]


class Single(Wire):
    """One feature, or one direction, on a text."""

    model: Name
    source: Name | None = None
    index: StrictStr | None = Field(None, pattern=INDEX)
    vector: Vector | None = None
    hook: Name | None = None


class SingleRequest(Single):
    """On one text."""

    prompt: Prompt


class SingleBatch(Single):
    """On several."""

    prompts: list[Prompt]


@router.post("/activation/single", response_model=dict[str, Any])
async def activation_single(request: SingleRequest, context: Given) -> Any:
    """The activations of one feature on each token of a text."""
    (found,) = await _single(request, [request.prompt], context)
    return await as_json(lambda: found)


@router.post("/activation/single-batch", response_model=dict[str, Any])
async def activation_single_batch(request: SingleBatch, context: Given) -> Any:
    """The same on several texts."""
    found = await _single(request, request.prompts, context)
    return await as_json(lambda: {"results": found})


async def _single(request: Single, prompts: Sequence[str], context: Context) -> list[dict[str, Any]]:
    of_feature = request.source is not None and request.index is not None
    of_vector = request.vector is not None and request.hook is not None
    if of_feature == of_vector:
        raise ProblemError(422, "Give either source and index, or vector and hook.")
    if of_feature:
        sae = source(context, request.model, request.source or "")
        query = Query(sae=sae.id, kind="values", features=(int(request.index or 0),))
    else:
        sae = reader_of(context, request.model, request.hook or "")
        query = Query(kind="values", hook=sae.record["hook"], vector=tuple(request.vector or ()))
    return [
        {"activation": peak(one["values"]) | NO_DFA, "tokens": one["tokens"], "tokensIsSpecial": one["special"]}
        for one in await single(sae, query, prompts, context)
    ]


class AllRequest(All):
    """On one text."""

    prompt: Prompt


class AllBatch(All):
    """On several."""

    prompts: list[Prompt]


@router.post("/activation/all", response_model=dict[str, Any])
async def activations_all(request: AllRequest, context: Given) -> Any:
    """The strongest features of a text, over all sources asked for."""
    (found,) = await strongest(request, [request.prompt], context)
    return await as_json(lambda: found)


@router.post("/activation/all-batch", response_model=dict[str, Any])
async def activations_all_batch(request: AllBatch, context: Given) -> Any:
    """The same for several texts."""
    found = await strongest(request, request.prompts, context)
    return await as_json(lambda: {"results": found})


class TopkRequest(TopkByToken):
    """Of one text."""

    prompt: Prompt


class TopkBatch(TopkByToken):
    """Of several."""

    prompts: list[Prompt]


@router.post("/activation/topk-by-token", response_model=dict[str, Any])
async def topk_by_token(request: TopkRequest, context: Given) -> Any:
    """The strongest features of each token."""
    (found,) = await by_token(request, [request.prompt], context)
    return await as_json(lambda: found)


@router.post("/activation/topk-by-token-batch", response_model=dict[str, Any])
async def topk_by_token_batch(request: TopkBatch, context: Given) -> Any:
    """The same for several texts."""
    found = await by_token(request, request.prompts, context)
    return await as_json(lambda: {"results": found})


class SourceRequest(Wire):
    """All features that fire."""

    model: Name
    source: Name
    prompts: list[Prompt]


@router.post("/activation/source", response_model=dict[str, Any])
async def activation_source(request: SourceRequest, context: Given) -> Any:
    """All features of a source that fire on texts, with the tokens where they do."""
    found = await active(source(context, request.model, request.source), request.prompts, context)
    return await as_json(lambda: {"results": found})


class VectorRequest(Wire):
    """A feature whose direction is asked for."""

    model: Name
    source: Name
    index: int = Field(ge=0)


@router.post("/util/sae-vector")
async def sae_vector(request: VectorRequest, context: Given) -> dict[str, Any]:
    """A feature's column of W_enc, as Neuronpedia's server gives it."""
    sae = source(context, request.model, request.source)
    vector = answered(await context.model(sae).direction(sae.id, request.index, "encoder"))
    return {"vector": vector, "hookName": sae.record["hook"]}


class CosineFeature(Wire):
    """A feature by its names."""

    model: Name
    source: Name
    index: int = Field(ge=0)


class CosineRequest(Wire):
    """A feature or a vector, and the source whose decoder it is held against."""

    feature: CosineFeature | None = None
    vector: Vector | None = None
    model: Name
    source: Name
    num_results: int = Field(10, ge=1, le=128)


@router.post("/util/sae-topk-by-decoder-cossim")
async def nearest(request: CosineRequest, context: Given) -> dict[str, Any]:
    """Features whose decoder directions are nearest to a feature's, or to a vector, by cosine."""
    if (request.feature is None) == (request.vector is None):
        raise ProblemError(422, "Give either feature or vector.")
    sae = source(context, request.model, request.source)
    wanted: Sequence[float] | int = request.vector or []
    if request.feature is not None:
        other = source(context, request.feature.model, request.feature.source)
        wanted = request.feature.index
        if other.id != sae.id:
            wanted = answered(await context.model(other).direction(other.id, request.feature.index, "decoder"))
    found = answered(await context.model(sae).nearest(sae.id, wanted, request.num_results))
    return {
        "feature": request.feature.model_dump(by_alias=True) if request.feature else None,
        "topkDecoderCossimFeatures": [
            {
                "feature": {"model": request.model, "source": request.source, "index": index},
                "cosineSimilarity": cosine,
            }
            for index, cosine in found
        ],
    }


class TokenizeRequest(Wire):
    """A text to cut into tokens."""

    model: Name
    text: Prompt
    prepend_bos: bool | None = None


@router.post("/tokenize")
async def tokenize(request: TokenizeRequest, context: Given) -> dict[str, Any]:
    """The ids and strings of a text's tokens."""
    with_bos = request.prepend_bos is not False
    found = await tokens(context, request.model, request.text, with_bos=with_bos)
    return {"tokens": found.token_ids, "tokenStrings": found.tokens, "prependBos": with_bos}


@router.get("/capabilities")
async def capabilities(context: Given) -> dict[str, Any]:
    """Which models and sources there are, and what can be done with them."""
    running = [sae for sae in context.catalog.hosted if sae.model in context.models]
    models = {sae.neuronpedia_model: sae for sae in running}
    return {
        "models": [
            {"id": name, "name": sae.model_name, **(await context.model(sae).facts())} for name, sae in models.items()
        ],
        "sources": [{"model": sae.neuronpedia_model, "source": sae.source} for sae in running],
        "steerMethods": ["SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP"],
        "limits": {
            name: getattr(context.config.limits, name) for name in ("texts", "tokens", "top_k", "numbers", "new_tokens")
        },
    }
