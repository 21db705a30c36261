"""What the routes work with: settings, catalog, keys, and the interpreters, wherever those run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse

from midiscover.errors import MiDiscoverError
from midiscover.features.records import FeatureRecords
from midiscover.serving import ServeConfig
from midiscover.tracking import Tracker
from serve.access import Access
from serve.catalog import Catalog
from serve.exchange import Front, Model, Problem, Query, TextAnswer
from serve.hosted import Hosted
from serve.problems import ProblemError, of_error

Result = TypeVar("Result")
_COMPUTING = ThreadPoolExecutor(2, "answers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Of one ingress."""

    config: ServeConfig
    catalog: Catalog
    access: Access
    models: Mapping[tuple[str, str], Model]
    """By digest of the language model and `trained` or `shuffled`."""
    tracker: Tracker
    jobs: Callable[[], Any]
    """A client of the Ray Jobs API, made when it is first needed."""
    model_types: dict[tuple[str, str], str | None] = field(default_factory=dict)
    """Of the models that were asked; see `model_type`."""

    def close(self) -> None:
        """Look for SAEs and keys no more, and let the database go."""
        self.catalog.close()
        self.access.close()
        self.tracker.close()

    def model(self, sae: Hosted) -> Model:
        """The interpreter of an SAE's language model."""
        found = self.models.get(sae.model)
        if found is None:
            raise ProblemError(
                503, f"No interpreter of this deployment runs {sae.model_name}, which {sae.id} reads; deploy it again."
            )
        return found

    async def model_type(self, sae: Hosted) -> str | None:
        """The family of an SAE's language model, as its config.json calls it; None while no interpreter says."""
        if sae.model not in self.model_types:
            try:
                self.model_types[sae.model] = (await self.model(sae).facts())["model_type"]
            except ProblemError:
                return None
        return self.model_types[sae.model]

    def hosted(self, name: str) -> Hosted:
        """The SAE of this name. 404 where there is none."""
        return asked(lambda: self.catalog.find(name))

    def chosen(self, names: Sequence[str]) -> list[Hosted]:
        """The SAEs of these names, each once, all of one language model; the default one where none is named."""
        if not names:
            return [asked(lambda: self.catalog.default(self.models))]
        once = dict.fromkeys(names)
        if len(once) > self.config.limits.saes:
            raise ProblemError(422, f"{len(once)} SAEs are asked; at most {self.config.limits.saes} are at once.")
        found = {sae.id: sae for sae in map(self.hosted, once)}
        if len({sae.model for sae in found.values()}) > 1:
            raise ProblemError(422, "These SAEs read different language models; ask those of one at a time.")
        return list(found.values())

    def require_texts(self, texts: Sequence[str]) -> None:
        """422 for none, or too many."""
        if not 0 < len(texts) <= self.config.limits.texts:
            raise ProblemError(422, f"{len(texts)} texts are given; give 1 to {self.config.limits.texts}.")

    async def read(
        self, sae: Hosted, texts: Sequence[str], queries: Sequence[Query], front: Front = "corpus"
    ) -> list[TextAnswer]:
        """Ask the interpreter of `sae`, which all queries' SAEs share."""
        self.require_texts(texts)
        return answered(await self.model(sae).read(texts, queries, front))

    async def features(self, sae: Hosted) -> FeatureRecords:
        """The feature records of an SAE, opened in another thread. 404 where they are not written down."""
        return await in_thread(lambda: self.catalog.features(sae.id))

    async def rows(self, sae: Hosted) -> Sequence[Mapping[str, Any]]:
        """One row for each feature, by index, with what listings and labels say. 404 as above."""
        known = self.catalog.known_rows(sae.id)
        return known if known is not None else await in_thread(lambda: self.catalog.rows(sae.id))


def context_of(request: Request) -> Context:
    """For FastAPI's Depends."""
    return request.app.state.context


def asked(work: Callable[[], Result]) -> Result:
    """Errors with a sentence for people as an answer."""
    try:
        return work()
    except MiDiscoverError as error:
        raise of_error(error) from error


async def in_thread(work: Callable[[], Result]) -> Result:
    """The same in another thread: for what reads the store."""
    return await asyncio.to_thread(asked, work)


async def aside(work: Callable[[], Result]) -> Result:
    """In threads that a store which stays away can't hold up: for what computes longer than others may wait."""
    return await asyncio.get_running_loop().run_in_executor(_COMPUTING, work)


async def as_json(build: Callable[[], Any]) -> JSONResponse:
    """What `build` makes, as an answer; both `aside`."""
    return await aside(lambda: JSONResponse(build()))


def answered(result: Result | Problem) -> Result:
    """What an interpreter answered, or its problem raised."""
    if isinstance(result, Problem):
        raise ProblemError(result.status, result.detail)
    return result
