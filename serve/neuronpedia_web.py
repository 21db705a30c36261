"""The part of Neuronpedia's web application that programs use, /api/...: what its Python client asks, read-only.

Rows are those of an export (`midiscover.publish.neuronpedia`), so that a feature says the same here as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from pydantic import Field, StrictStr

from midiscover.config import NeuronpediaConfig
from midiscover.features.explanations import Explanation
from midiscover.features.labels import label
from midiscover.publish.neuronpedia import ModelFacts, NeuronpediaExport
from serve.context import Context, as_json, context_of, in_thread
from serve.exchange import Query
from serve.hosted import Hosted
from serve.neuronpedia import (
    NO_DFA,
    All,
    Name,
    Prompt,
    TopkByToken,
    Wire,
    active,
    by_token,
    number,
    peak,
    single,
    source,
    strongest,
    tokens,
    twice,
)
from serve.problems import ProblemError

router = APIRouter(prefix="/api", tags=["neuronpedia web"])
Given = Annotated[Context, Depends(context_of)]
Segment = Annotated[str, Path(min_length=1, max_length=128)]
Index = Annotated[int, Path(ge=0, lt=2**31)]
PAGE = 20
WIDER = 4
"""Times as many features of a token are looked at as are given, where those that fire too often are left out."""


async def feature_row(context: Context, sae: Hosted, index: int, activations: int | None = None) -> dict[str, Any]:
    """A feature as the web application gives it, with its activations and explanations."""
    records = await context.features(sae)
    family = await context.model_type(sae)
    facts = ModelFacts(name=sae.model_name, model_type=family, layers=0, d_model=0, neurons_per_layer=0)
    cfg: dict[str, Any] = {"metadata": {}}
    export = NeuronpediaExport(sae.record, cfg, facts, NeuronpediaConfig(model=sae.neuronpedia_model))

    def read() -> dict[str, Any]:
        feature = records.feature(index)
        # `source` is what the client reads, though the application does not send it.
        extra = {"source": sae.source, "layer": sae.source}
        rows: list[dict[str, Any]] = [row | extra for row in export.activation_rows(index, records.contexts(index))]
        for row in rows:
            if row["binContains"] < 0:  # of the top ones, which belong to no interval: its client takes no -1
                row["binContains"] = None
        rows.sort(key=lambda row: row["maxValue"], reverse=True)
        explained = []
        if feature["count"]:
            row = export.explanation_row(feature) | extra
            explained = [row | _said(row["id"], records.explanations.get(index)) | {"triggeredByUser": None}]
        return export.feature_row(feature) | {
            "layer": sae.source,
            "source": {"id": sae.source, "modelId": sae.neuronpedia_model, "hookName": export.hook},
            "sourceSet": {"name": sae.set},
            "model": {"id": sae.neuronpedia_model, "displayName": sae.model_name},
            "activations": rows[:activations],
            "explanations": explained,
            "lists": [],
            "comments": [],
            "creator": {"name": "miDiscover"},
        }

    return await in_thread(read)


def _said(row: str, explanation: Explanation | None) -> dict[str, Any]:
    """Which model an explanation is from, and its scores; of a label that no model made, none."""
    if explanation is None:
        return {"explanationModelName": None, "scores": []}
    scores = (("eleuther_recall", explanation.detection), ("eleuther_fuzz", explanation.fuzz))
    return {
        "explanationModelName": explanation.llm,
        "scores": [
            {
                "id": f"{row}-{kind}",
                "value": value,
                "explanationId": row,
                "explanationScoreTypeName": kind,
                "explanationScoreModelName": explanation.llm,
                "jsonDetails": "[]",
            }
            for kind, value in scores
            if value is not None
        ],
    }


@router.get("/feature/{model}/{source_id}/{index}")
async def feature(model: Segment, source_id: Segment, index: Index, context: Given) -> dict[str, Any]:
    """Everything about a feature."""
    return await feature_row(context, source(context, model, source_id), index)


class FeatureWanted(Wire):
    """A feature by its names."""

    model_id: Name
    layer: Name
    index: int | StrictStr
    max_acts_to_return: int | None = Field(None, ge=0, le=1000)


@router.post("/features")
async def features(
    wanted: Annotated[list[FeatureWanted], Field(max_length=128)], context: Given
) -> list[dict[str, Any]]:
    """The same of several features."""
    return [
        await feature_row(context, source(context, one.model_id, one.layer), number(one.index), one.max_acts_to_return)
        for one in wanted
    ]


class FeatureNamed(Wire):
    """A feature whose activations are asked for."""

    model_id: Name
    source: Name | None = None
    layer: Name | None = None
    index: int | StrictStr

    @property
    def place(self) -> str:
        """Its source."""
        found = self.source or self.layer
        if found is None:
            raise ProblemError(422, "feature.source is missing.")
        return found


class ActivationNew(Wire):
    """Texts on which a feature is run."""

    feature: FeatureNamed
    custom_text: Prompt | list[Prompt]
    ignore_bos: bool = False
    """Leave out a special token that the text begins with, too."""


@router.post("/activation/new", response_model=None)
async def activation_new(request: ActivationNew, context: Given) -> Any:
    """The activations of a feature on a text, or on each of several."""
    sae, index = source(context, request.feature.model_id, request.feature.place), number(request.feature.index)
    many = isinstance(request.custom_text, list)
    texts = request.custom_text if isinstance(request.custom_text, list) else [request.custom_text]
    query = Query(sae=sae.id, kind="values", features=(index,))
    found = []
    for one in await single(sae, query, texts, context):
        first = 1 if request.ignore_bos and one["special"][:1] == [True] else 0
        values = one["values"][first:]
        at = peak(values)
        found.append(
            {
                "tokens": one["tokens"][first:],
                "values": values,
                "maxValue": at["maxValue"],
                "minValue": min(values, default=0.0),
                "maxValueTokenIndex": at["maxValueIndex"],
                "modelId": sae.neuronpedia_model,
                "layer": sae.source,
                "index": str(index),
                "creatorId": None,
                "dataIndex": None,
                "dataSource": None,
                "createdAt": None,
                **NO_DFA,
            }
        )
    return await as_json(lambda: found if many else found[0])


class ActivationGet(Wire):
    """A feature whose contexts are asked for."""

    model_id: Name
    source: Name
    index: int | StrictStr


@router.post("/activation/get")
async def activation_get(request: ActivationGet, context: Given) -> list[dict[str, Any]]:
    """The contexts of a feature."""
    sae = source(context, request.model_id, request.source)
    return (await feature_row(context, sae, number(request.index)))["activations"]


class ActivationSource(Wire):
    """Texts on which a whole source is run."""

    model_id: Name
    source: Name
    custom_text: Prompt | list[Prompt]


@router.post("/activation/source", response_model=dict[str, Any])
async def activation_source(request: ActivationSource, context: Given) -> Any:
    """All features of a source that fire on texts."""
    texts = request.custom_text if isinstance(request.custom_text, list) else [request.custom_text]
    found = await active(source(context, request.model_id, request.source), texts, context)
    return await as_json(lambda: {"results": found})


class SearchAll(Wire):
    """Texts whose strongest features are asked for."""

    model_id: Name
    source_set: Name
    text: Prompt | list[Prompt]
    selected_layers: list[Name] = Field(default_factory=list)
    sort_indexes: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    ignore_bos: bool = True
    density_threshold: float = -1
    num_results: int = Field(50, ge=1, le=100)


@twice(router, "/search-all", response_model=dict[str, Any])
async def search_all(request: SearchAll, context: Given) -> Any:
    """The strongest features of texts over the sources of a set, those that fire too often left out."""
    many = isinstance(request.text, list)
    texts = request.text if isinstance(request.text, list) else [request.text]
    inner = All(
        model=request.model_id,
        source_set=request.source_set,
        selected_sources=request.selected_layers,
        sort_by_token_indexes=request.sort_indexes,
        ignore_bos=request.ignore_bos,
        num_results=context.config.limits.top_k if bounds(request.density_threshold) else request.num_results,
    )
    answers = await strongest(inner, texts, context)
    named = {row["source"] for answer in answers for row in answer["activations"]}
    is_rare = await rarity(context, request.model_id, named, request.density_threshold)

    def results() -> dict[str, Any]:
        rows = []
        for answer in answers:
            kept = [row for row in answer["activations"] if is_rare(row["source"], row["index"])]
            found = [
                {"modelId": request.model_id, "layer": row["source"], **row, "index": str(row["index"])}
                for row in kept[: request.num_results]
            ]
            rows.append({"tokens": answer["tokens"], "result": found, "sortIndexes": request.sort_indexes})
        return {"results": rows} if many else rows[0]

    return await as_json(results)


def bounds(threshold: float) -> bool:
    """Whether a densityThreshold leaves anything out; 0 and -1 say that it should not."""
    return 0 < threshold < 1


async def rarity(context: Context, model: str, sources: Iterable[str], threshold: float) -> Callable[[str, int], bool]:
    """Whether a source's feature fires on so small a share of the tokens; one of which nothing is known does."""
    rates: dict[str, list[float]] = {}
    for name in sources if bounds(threshold) else ():
        with suppress(ProblemError):
            rates[name] = [row["firing_rate"] for row in await context.rows(source(context, model, name))]

    def is_rare(name: str, feature: int) -> bool:
        of = rates.get(name, ())
        return feature >= len(of) or of[feature] <= threshold

    return is_rare


class SearchTopk(Wire):
    """Texts whose tokens' strongest features are asked for."""

    model_id: Name
    source: Name
    text: Prompt | list[Prompt]
    num_results: int = Field(10, ge=1, le=20)
    ignore_bos: bool = True
    density_threshold: float = 0.01


@twice(router, "/search-topk-by-token", response_model=dict[str, Any])
async def search_topk(request: SearchTopk, context: Given) -> Any:
    """The strongest features of each token of texts, those that fire too often left out."""
    many = isinstance(request.text, list)
    texts = request.text if isinstance(request.text, list) else [request.text]
    wider = WIDER if bounds(request.density_threshold) else 1
    inner = TopkByToken(
        model=request.model_id,
        source=request.source,
        top_k=min(wider * request.num_results, context.config.limits.top_k),
        ignore_bos=request.ignore_bos,
    )
    answers = await by_token(inner, texts, context)
    is_rare = await rarity(context, request.model_id, [request.source], request.density_threshold)

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        kept = [one for one in row["topFeatures"] if is_rare(request.source, one["featureIndex"])]
        return {
            "position": row["tokenPosition"],
            "token": row["token"],
            "isSpecial": row["isSpecial"],
            "topFeatures": kept[: request.num_results],
        }

    def results() -> dict[str, Any]:
        rows = [{"source": request.source, "results": [shown(row) for row in one["results"]]} for one in answers]
        return {"source": request.source, "results": rows} if many else rows[0]

    return await as_json(results)


class WebTokenize(Wire):
    """A text to cut into tokens."""

    model_id: Name
    prompt: Prompt
    prepend_bos: bool = True


@router.post("/tokenize")
async def tokenize(request: WebTokenize, context: Given) -> dict[str, Any]:
    """The ids and strings of a text's tokens."""
    found = await tokens(context, request.model_id, request.prompt, with_bos=request.prepend_bos)
    return {"tokens": found.token_ids, "tokenStrings": found.tokens, "prependBos": request.prepend_bos}


class ExplanationSearch(Wire):
    """Words that an explanation should hold."""

    model_id: Name
    layers: list[Name] = Field(min_length=1, max_length=64)
    query: Annotated[StrictStr, Field(min_length=3, max_length=200)]
    offset: int = Field(0, ge=0, lt=2**31)


@twice(router, "/explanation/search")
async def explanation_search(request: ExplanationSearch, context: Given) -> dict[str, Any]:
    """Features whose explanation holds the words; by their letters, not by an embedding."""
    words = request.query.casefold().split()
    if not words:
        raise ProblemError(422, "The query holds no word.")
    named = [source(context, request.model_id, layer) for layer in request.layers]
    saes = {sae.id: sae for sae in named}.values()

    def scan() -> list[tuple[Hosted, dict[str, Any]]]:
        found = []
        for sae in saes:
            rows, labels = context.catalog.listing(sae.id)
            fits = [row for row in rows if row["count"] and all(word in labels[row["index"]] for word in words)]
            found += [(sae, row) for row in fits]
        return found

    found = await in_thread(scan)
    shown = found[request.offset : request.offset + PAGE]
    results = [
        {
            "modelId": request.model_id,
            "layer": sae.source,
            "index": str(row["index"]),
            "description": label(row),
            "neuron": {
                "modelId": request.model_id,
                "layer": sae.source,
                "index": str(row["index"]),
                "maxActApprox": row["max"],
                "frac_nonzero": row["firing_rate"],
            },
        }
        for sae, row in shown
    ]
    after = request.offset + len(shown)
    return {
        "request": request.model_dump(by_alias=True),
        "results": results,
        "resultsCount": len(results),
        "hasMore": after < len(found),
        "nextOffset": after if after < len(found) else None,
    }
