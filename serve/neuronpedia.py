"""What Neuronpedia's interfaces share: how they name things, and how they answer.

Members are camelCase on the wire, snake_case is taken as well. BOS is put before a prompt that does not begin with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr
from pydantic.alias_generators import to_camel

from serve.api import MOST_PROMPT
from serve.context import Context, answered, aside, asked
from serve.exchange import Found, Query, TextAnswer
from serve.hosted import Hosted
from serve.problems import ProblemError

Prompt = Annotated[StrictStr, Field(min_length=1, max_length=MOST_PROMPT)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=128)]
Vector = list[Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]]
"""A direction; what is larger overflows float32 where it meets activations."""
Seed = Annotated[int, AfterValidator(lambda seed: seed % 2**63)]
"""Any whole number, negative ones too."""
INDEX = r"^[0-9]{1,9}$"
_INDEX = re.compile(INDEX.strip("^$"))
NO_DFA: dict[str, Any] = {"dfaValues": None, "dfaMaxValue": None, "dfaTargetIndex": None}
"""Direct feature attribution is for attention SAEs that Neuronpedia marks so; null as there."""


class Wire(BaseModel):
    """camelCase, or snake_case, on the way in."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class All(Wire):
    """The strongest features of several sources."""

    model: Name
    source_set: Name
    selected_sources: list[Name] = Field(default_factory=list)
    sort_by_token_indexes: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    ignore_bos: bool = True
    num_results: int = Field(25, ge=1)


class TopkByToken(Wire):
    """The strongest features of each token."""

    model: Name
    source: Name
    top_k: int = Field(5, ge=1)
    ignore_bos: bool = True


def peak(values: list[float]) -> dict[str, Any]:
    """Values with their maximum and its place."""
    highest = max(values, default=0.0)
    return {"values": values, "maxValue": highest, "maxValueIndex": values.index(highest) if values else 0}


async def strongest(request: All, prompts: Sequence[str], context: Context) -> list[dict[str, Any]]:
    """For each text the features of all sources, highest first; by the sum over some tokens where they are named."""
    limit = context.config.limits.top_k
    if request.num_results > limit:
        raise ProblemError(422, f"numResults is {request.num_results}; at most {limit} are given at once.")
    saes = sources(context, request.model, request.source_set, request.selected_sources)
    at = tuple(request.sort_by_token_indexes)
    queries = [
        Query(sae=s.id, k=request.num_results, per_token=False, rank_at=at, skip_first=request.ignore_bos) for s in saes
    ]
    answers = await context.read(saes[0], prompts, queries, "bos")

    def results() -> list[dict[str, Any]]:
        return [_strongest(answer, saes, at, request.num_results) for answer in answers]

    return await aside(results)


def _strongest(answer: TextAnswer, saes: Sequence[Hosted], at: Sequence[int], most: int) -> dict[str, Any]:
    rows = [row for sae, found in zip(saes, answer.found, strict=True) for row in _rows(sae.source, found, at)]
    rows.sort(key=lambda row: row["sumValues"] if at else row["maxValue"], reverse=True)  # stable
    return {"activations": rows[:most], "tokens": answer.tokens, "counts": None}


def _rows(name: str, found: Found, at: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for feature, values in zip(found.strongest.tolist(), found.values.tolist(), strict=True):
        total = sum(values[i] for i in at) if at else sum(values)
        rows.append({"source": name, "index": feature, **peak(values), "sumValues": total, **NO_DFA})
    return rows


async def by_token(request: TopkByToken, prompts: Sequence[str], context: Context) -> list[dict[str, Any]]:
    """For each text, its tokens with their strongest features; positions count from BOS, which may be left out."""
    limit = context.config.limits.top_k
    if request.top_k > limit:
        raise ProblemError(422, f"topK is {request.top_k}; at most {limit} are given at once.")
    sae = source(context, request.model, request.source)
    query = Query(sae=sae.id, k=request.top_k, per_text=False)
    answers = await context.read(sae, prompts, [query], "bos")
    return await aside(
        lambda: [_by_token(answer, 1 if request.ignore_bos and answer.has_bos else 0) for answer in answers]
    )


def _by_token(answer: TextAnswer, first: int) -> dict[str, Any]:
    """The tokens from `first` on."""
    entries, found = answer.found[0], [[] for _ in answer.tokens]
    for token, feature, value in zip(
        entries.token.tolist(), entries.feature.tolist(), entries.value.tolist(), strict=True
    ):
        found[token].append({"featureIndex": feature, "activationValue": value})
    rows = [
        {"tokenPosition": place, "token": token, "isSpecial": special, "topFeatures": features}
        for place, (token, special, features) in enumerate(zip(answer.tokens, answer.special, found, strict=True))
    ]
    return {"results": rows[first:], "tokens": answer.tokens[first:]}


async def active(sae: Hosted, prompts: Sequence[str], context: Context) -> list[dict[str, Any]]:
    """For each text its tokens, and feature -> [[token, value], ...]; BOS counts as 0."""
    query = Query(sae=sae.id, kind="active", skip_first=True)
    answers = await context.read(sae, prompts, [query], "bos")
    return await aside(lambda: [{"tokens": one.tokens, "activeFeatures": _fires(one.found[0])} for one in answers])


def _fires(found: Found) -> dict[str, list[list[float]]]:
    fires: dict[str, list[list[float]]] = {}
    for token, feature, value in zip(found.token.tolist(), found.feature.tolist(), found.value.tolist(), strict=True):
        fires.setdefault(str(feature), []).append([token, value])
    return fires


async def single(sae: Hosted, query: Query, prompts: Sequence[str], context: Context) -> list[dict[str, Any]]:
    """For each text its tokens and the values of a query's one feature, but for the BOS in front; others count as 0."""
    results = []
    for answer in await context.read(sae, prompts, [query], "bos"):
        values, first = answer.found[0].values[0].tolist(), 0
        if answer.has_bos:
            bos, first = answer.token_ids[0], 1
            values = [0.0 if token == bos else value for token, value in zip(answer.token_ids, values, strict=True)]
        results.append({"values": values[first:], "tokens": answer.tokens[first:], "special": answer.special[first:]})
    return results


def number(index: int | str) -> int:
    """A feature's index, which comes as text or as a number."""
    if not _INDEX.fullmatch(str(index)):
        raise ProblemError(422, f"'{index}' is no index of a feature.")
    return int(index)


def twice(router: APIRouter, path: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A POST route with and without a slash at its end: the client asks with one where it has nothing to add."""

    def decorate(route: Callable[..., Any]) -> Callable[..., Any]:
        router.post(path, **settings)(route)
        router.post(f"{path}/", include_in_schema=False, **settings)(route)
        return route

    return decorate


async def tokens(context: Context, model: str, text: str, *, with_bos: bool) -> TextAnswer:
    """A text's tokens by the model of this name."""
    sae = any_of(context, model)
    return answered(await context.model(sae).tokenise(text, "bos" if with_bos else "none"))


def source(context: Context, model: str, name: str) -> Hosted:
    """The SAE that Neuronpedia would call so; our own ids are understood as well."""
    try:
        return asked(lambda: context.catalog.by_source(model, name))
    except ProblemError:
        ours = [sae for sae in context.catalog.hosted if sae.id == name and sae.neuronpedia_model == model]
        if not ours:
            raise
        return ours[0]


def sources(context: Context, model: str, set_name: str, selected: Sequence[str]) -> list[Hosted]:
    """The sources asked for, or all of a set."""
    if selected:
        found = [source(context, model, name) for name in dict.fromkeys(selected)]
    else:
        found = [sae for sae in context.catalog.hosted if sae.neuronpedia_model == model and sae.set == set_name]
    if not found:
        known = ", ".join(sorted({sae.set for sae in context.catalog.hosted})) or "none"
        raise ProblemError(404, f"There is no source set '{set_name}' of '{model}' here; there is {known}.")
    return context.chosen([sae.id for sae in found])


def any_of(context: Context, model: str) -> Hosted:
    """Some SAE of a model: whatever needs the model alone is asked of its interpreter."""
    found = next((sae for sae in context.catalog.hosted if sae.neuronpedia_model == model), None)
    if found is None:
        known = ", ".join(sorted({sae.neuronpedia_model for sae in context.catalog.hosted})) or "none"
        raise ProblemError(404, f"There is no model '{model}' here; there is {known}.")
    return found


def reader_of(context: Context, model: str, hook: str) -> Hosted:
    """Some SAE of a model that reads this hook, a module's path. 404 where there is none."""
    wanted = any_of(context, model).model
    of_model = [sae for sae in context.catalog.hosted if sae.model == wanted]
    found = next((sae for sae in of_model if sae.record["hook"] == hook), None)
    if found is None:
        known = ", ".join(sorted({sae.record["hook"] for sae in of_model}))
        raise ProblemError(404, f"No SAE of '{model}' here reads the hook '{hook}'; they read {known}.")
    return found
