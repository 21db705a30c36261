"""What is hosted, and what is known of it: /health, /saes, /runs, /features, /search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, Field

import midiscover
from midiscover.errors import CorruptError, NotFoundError
from midiscover.features.labels import label
from midiscover.store import layout
from midiscover.store.documents import read_json
from serve import exchange
from serve.api import SaeName, Strict, Text
from serve.catalog import Listing
from serve.context import Context, context_of, in_thread
from serve.hosted import Hosted
from serve.problems import ProblemError

router = APIRouter(tags=["browse"])
Given = Annotated[Context, Depends(context_of)]
Name = Annotated[str, Path(min_length=1, max_length=128, description="An id, or the beginning of one.")]
Row = Mapping[str, Any]
SORTS = Literal["index", "firing_rate", "mean", "max", "std"]
WIDER = 8
"""Times as many features are looked at as are shown, where those that fire elsewhere too are left out."""


class Health(BaseModel):
    """Whether the deployment answers as it should."""

    status: Literal["ok", "degraded"]
    reasons: list[str]
    version: str
    saes: int


@router.get("/health", response_model=Health)
@router.head("/health", include_in_schema=False)
async def health(context: Given) -> Health:
    """Open to everybody; says no more than a monitor needs."""
    catalog = context.catalog
    idle = sorted({sae.model_name for sae in catalog.hosted if sae.model not in context.models})
    told = {
        "the store does not answer; what is loaded goes on being served": catalog.away_since is not None,
        "what the store holds can't be looked through; the log has the reason": catalog.stuck is not None,
        "the tracking database does not answer; the keys known last are good": context.access.away_since is not None,
        "something is wrong with promoted.json; the log has the reason": catalog.promoted_wrong,
        f"{len(catalog.missing)} SAEs or sweeps that are to be hosted are not in the store": catalog.missing,
        f"{len(catalog.broken)} SAEs of the store can't be read": catalog.broken,
        f"the feature records of {len(catalog.damaged)} SAEs are damaged": catalog.damaged,
        f"no interpreter runs {', '.join(idle)}; its SAEs can't be asked": idle,
    }
    reasons = [reason for reason, holds in told.items() if holds]
    status: Literal["ok", "degraded"] = "degraded" if reasons else "ok"
    return Health(status=status, reasons=reasons, version=midiscover.__version__, saes=len(catalog.hosted))


class Saes(BaseModel):
    """The SAEs of a deployment."""

    saes: list[dict[str, Any]]
    broken: dict[str, str] = Field(description="SAEs of the store that can't be read, and why.")


@router.get("/saes", response_model=Saes)
async def list_saes(context: Given) -> Saes:
    """What is hosted."""
    return Saes(saes=[sae.summary() for sae in context.catalog.hosted], broken=context.catalog.broken)


@router.get("/saes/{sae}")
async def show_sae(sae: Name, context: Given) -> dict[str, Any]:
    """The record of one SAE: settings, metrics, where it comes from."""
    hosted = context.hosted(sae)
    return {**hosted.record, "promoted": hosted.is_promoted, "neuronpedia": hosted.summary()["neuronpedia"]}


@router.get("/saes/{sae}/features/{index}")
async def show_feature(sae: Name, index: Annotated[int, Path(ge=0, lt=2**31)], context: Given) -> dict[str, Any]:
    """Everything about one feature: statistics, contexts, logits, neighbours."""
    hosted = context.hosted(sae)
    records = await context.features(hosted)

    def read() -> dict[str, Any]:
        row = records.feature(index)
        return {
            "sae": hosted.id,
            "label": label(row),
            **row,
            "explained": explanation._asdict() if (explanation := records.explanations.get(index)) else None,
            "contexts": [c._asdict() for c in records.contexts(index)],
        }

    return await in_thread(read)


@router.get("/runs")
async def list_runs(context: Given) -> dict[str, Any]:
    """Sweeps that the tracker knows, newest first."""
    return {"runs": await in_thread(context.tracker.list_runs)}


@router.get("/runs/{run}")
async def show_run(run: Name, context: Given) -> dict[str, Any]:
    """One sweep with its SAEs, their settings and what was measured of them."""
    shown = await in_thread(lambda: context.tracker.show(run))
    if shown["type"] != "sweep":
        raise ProblemError(404, f"'{run}' is an SAE; /saes/{run} shows it.")
    return {**shown, "compared": await in_thread(lambda: context.tracker.compare(shown["id"]))}


class Page(BaseModel):
    """A page of features."""

    sae: str
    total: int = Field(description="Features that fit, on all pages.")
    page: int
    features: list[dict[str, Any]]


@router.get("/features/{run_id}", response_model=Page)
async def list_features(
    run_id: Name,
    context: Given,
    sae: Annotated[str | None, Query(max_length=128, description="Of a sweep, the SAE.")] = None,
    page: Annotated[int, Query(ge=1, lt=2**31)] = 1,
    size: Annotated[int, Query(ge=1, le=200)] = 50,
    sort: SORTS = "firing_rate",
    order: Literal["asc", "desc"] = "desc",
    min_rate: Annotated[float, Query(ge=0, le=1, description="Fires on this share of the tokens at least.")] = 0.0,
    max_rate: Annotated[float, Query(ge=0, le=1)] = 1.0,
    concept: Annotated[str | None, Query(max_length=128, description="Only those that stand for it.")] = None,
    text: Annotated[str | None, Query(max_length=200, description="Only those whose label holds this.")] = None,
) -> Page:
    """Features of an SAE, or of one of a sweep's: sorted, filtered, page by page."""
    hosted = await one_of(context, run_id, sae)
    judged = await concept_features(context, hosted, concept) if concept is not None else None
    wanted = (text or "").casefold()

    def read() -> Page:
        rows, labels = context.catalog.listing(hosted.id)
        chosen: Sequence[Row] = rows
        if judged is not None:
            chosen = [{**rows[feature], "concept": judged[feature]} for feature in judged if feature < len(rows)]
        fits = [row for row in chosen if min_rate <= row["firing_rate"] <= max_rate and wanted in labels[row["index"]]]
        fits.sort(key=lambda row: (row[sort], -row["index"]), reverse=order == "desc")
        shown = [{**row, "label": label(row)} for row in fits[(page - 1) * size : page * size]]
        return Page(sae=hosted.id, total=len(fits), page=page, features=shown)

    return await in_thread(read)


async def one_of(context: Context, run: str, sae: str | None) -> Hosted:
    """The SAE that a path means: itself, or one of a sweep."""
    members = await in_thread(lambda: context.catalog.members(run))
    if sae is not None:
        members = [name for name in members if name.startswith(sae)]
    if len(members) != 1:
        named = ", ".join(members[:5]) or "none of them"
        raise ProblemError(422 if members else 404, f"'{run}' means {len(members)} SAEs; give ?sae= with one: {named}.")
    return context.hosted(members[0])


async def concept_features(context: Context, sae: Hosted, concept: str) -> dict[int, dict[str, Any]]:
    """Feature -> how it was judged for a concept, best first. 404 where nobody judged."""

    def read() -> dict[int, dict[str, Any]]:
        # A name of the store is made of what was listed there, never of what was asked.
        folder = layout.sae_file(sae.id, "concepts")
        known = {key.rpartition("/")[2].removesuffix(".json"): key for key in context.catalog.storage.list(folder)}
        document = read_json(context.catalog.storage, known[concept]) if concept in known else None
        if document is None:
            judged = ", ".join(sorted(known)) or "none"
            raise NotFoundError(f"'{concept}' was not judged for {sae.id}; judged are {judged}: `midiscover concepts`.")
        names = ("by", "auroc", "family_wise_p", "passes")
        found = document["sae_scores"]["features"]
        return {row["feature"]: {name: row[name] for name in names} for row in found}

    return await in_thread(read)


class Hit(BaseModel):
    """A feature that was found."""

    sae: str
    feature: int
    label: str
    firing_rate: float
    max: float


@router.get("/search")
async def search_features(
    context: Given,
    label_text: Annotated[str | None, Query(alias="label", min_length=2, max_length=200)] = None,
    token: Annotated[
        str | None, Query(min_length=1, max_length=100, description="Among a feature's top tokens.")
    ] = None,
    sae: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
) -> dict[str, list[Hit]]:
    """Features by what their label says, or by a token at which they peak, the rarer ones first."""
    if (label_text is None) == (token is None):
        raise ProblemError(422, "Give label or token.")
    wanted = (label_text or token or "").strip().casefold()
    if label_text is not None and not wanted:
        raise ProblemError(422, "The label to look for is blank; give at least a letter of it.")
    asked_of = [context.hosted(sae)] if sae else context.catalog.hosted

    def fits(listing: Listing, row: Row) -> bool:
        if label_text is not None:
            return wanted in listing.labels[row["index"]]
        if not wanted:  # of tokens that are blank each is itself
            return token in row["top_tokens"]
        return any(one.strip().casefold() == wanted for one in row["top_tokens"])

    def scan() -> list[Hit]:
        hits = []
        for hosted in asked_of:
            try:
                listing = context.catalog.listing(hosted.id)
            except (NotFoundError, CorruptError):
                if sae is not None:
                    raise
                continue  # its features are not written down, or damaged, which /health says
            rows = [row for row in listing.rows if row["count"] and fits(listing, row)]
            hits += [(row["firing_rate"], hosted.id, row) for row in rows]
        hits.sort(key=lambda hit: hit[:2])
        return [
            Hit(sae=name, feature=row["index"], label=label(row), firing_rate=rate, max=row["max"])
            for rate, name, row in hits[:limit]
        ]

    return {"features": await in_thread(scan)}


class ContrastRequest(Strict):
    """Texts to tell apart."""

    text: Text = Field(description="Features that fire here,", examples=["The river ran past the old mill."])
    without: Text | None = Field(None, description="and not here.", examples=["The engine ran past the old shed."])
    sae: SaeName | None = None
    top_k: int = Field(10, ge=1, le=100)


class Contrast(BaseModel):
    """A feature that fires in one text."""

    feature: int
    max: float
    max_without: float = Field(description="In the other text.")
    label: str | None


class ContrastAnswer(BaseModel):
    """Features by how much more they fire in the first text."""

    sae: str
    tokens: list[str]
    features: list[Contrast]


@router.post("/search", response_model=ContrastAnswer)
async def search_by_text(request: ContrastRequest, context: Given) -> ContrastAnswer:
    """Which features fire in this text and not in that one."""
    (sae,) = context.chosen([request.sae] if request.sae else [])
    wide = exchange.Query(sae=sae.id, k=WIDER * request.top_k, per_token=False)
    (here,) = await context.read(sae, [request.text], [wide])
    features = tuple(here.found[0].strongest.tolist())
    highest = here.found[0].values.max(1).tolist() if features else []
    elsewhere = [0.0] * len(features)
    if request.without is not None and features:
        again = exchange.Query(sae=sae.id, kind="values", features=features)
        (there,) = await context.read(sae, [request.without], [again])
        elsewhere = there.found[0].values.max(1).tolist()
    try:
        rows = await context.rows(sae)
    except ProblemError:
        rows = []
    found = [
        Contrast(
            feature=feature, max=top, max_without=other, label=label(rows[feature]) if feature < len(rows) else None
        )
        for feature, top, other in zip(features, highest, elsewhere, strict=True)
        if top > other
    ]
    found.sort(key=lambda one: one.max - one.max_without, reverse=True)
    return ContrastAnswer(sae=sae.id, tokens=here.tokens, features=found[: request.top_k])
