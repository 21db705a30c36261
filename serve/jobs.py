"""Training by request: /train starts a sweep of a config that the server holds, /jobs tells how it goes and ends it.

Whoever may start a job runs code on the cluster, so all of it needs the scope `admin`, and a request names a config and
numbers, never a path, a model, a text or a store.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends
from fastapi import Path as PathParameter
from pydantic import BaseModel, Field

import jobs
from jobs.submit import CONFIG, find_job, job_rows, progress_of, submit
from midiscover.configio import load_config
from midiscover.errors import MiDiscoverError, NotFoundError
from midiscover.store.storage import store_uri
from serve.api import Strict
from serve.context import Context, asked, context_of, in_thread
from serve.problems import ProblemError

router = APIRouter(tags=["train"])
Given = Annotated[Context, Depends(context_of)]
JobName = Annotated[str, PathParameter(min_length=1, max_length=200, description="A job's id, or the beginning of it.")]
Number = int | float
Result = TypeVar("Result")
LOG_LINES = 200
_PATH = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)+")


class TrainRequest(Strict):
    """A config of the server's, and numbers that go over its own."""

    config: str = Field(min_length=1, max_length=64, examples=["quick"])
    stage: Literal["sweep", "harvest", "features", "pipeline"] = "sweep"
    overrides: dict[str, Number | list[Number]] = Field(
        default_factory=dict,
        max_length=50,
        description="Settings by their path, as the flags of `midiscover sweep`.",
        examples=[{"train.epochs": 1, "grid.sae.l1_coefficient": [1, 2]}],
    )


class JobStarted(BaseModel):
    """A job that was submitted."""

    id: str
    config: str


class JobShown(BaseModel):
    """How a job goes."""

    id: str
    stage: str | None
    name: str | None
    status: str = Field(description="pending, running, succeeded, failed or stopped")
    started: int | None = Field(description="Milliseconds since 1970.")
    ended: int | None
    progress: list[dict[str, Any]] = Field(description="Each line of the job's progress: stage, name, percent, note.")
    log: list[str] = Field(description=f"Its last {LOG_LINES} lines.")


@router.post("/train", status_code=202, response_model=JobStarted)
async def train(request: TrainRequest, context: Given) -> JobStarted:
    """Start a job; it goes on whatever becomes of the server."""
    config = configs(context).get(request.config)
    if config is None:
        known = ", ".join(sorted(configs(context)))
        raise ProblemError(422, f"There is no config '{request.config}' here; there is {known}.")
    wrong = next((path for path in request.overrides if not _PATH.fullmatch(path)), None)
    if wrong is not None:
        raise ProblemError(422, f"'{wrong}' is no path of a setting, such as train.lr.")

    def start() -> str:
        overrides: dict[str, Any] = {}
        for path, value in request.overrides.items():
            section, _, axis = path.partition(".")
            given = tuple(value) if isinstance(value, list) else value
            if section == "grid":
                overrides.setdefault("grid", {})[axis] = given
            else:
                overrides[path] = given
        resolved = asked(lambda: load_config(config, overrides))
        store = str(Path(store_uri(context.config.store)).resolve()) if context.catalog.storage.is_local else None
        words = [CONFIG, "--store", store or store_uri(context.config.store)]
        return submit(context.jobs(), request.stage, words, resolved)

    return JobStarted(id=await of_cluster(start), config=request.config)


@router.get("/jobs")
async def list_jobs(context: Given) -> dict[str, list[dict[str, Any]]]:
    """Jobs of the cluster, newest first."""
    return {"jobs": await of_cluster(lambda: job_rows(context.jobs()))}


@router.get("/jobs/{job}", response_model=JobShown)
async def show_job(job: JobName, context: Given) -> JobShown:
    """How far a job is, and what it said."""

    def read() -> JobShown:
        client = context.jobs()
        name = find_job(client, job)
        row = next((row for row in job_rows(client) if row["id"] == name), None)
        if row is None:
            raise NotFoundError(f"There is no job '{job}' of ours on the cluster.")
        log = client.get_job_logs(name)
        shown = {key: row[key] for key in ("id", "stage", "name", "status", "started", "ended")}
        return JobShown(**shown, progress=progress_of(log), log=log.splitlines()[-LOG_LINES:])

    return await of_cluster(read)


@router.delete("/jobs/{job}")
async def stop_job(job: JobName, context: Given) -> dict[str, Any]:
    """Ask a job to stop; what it has committed is kept, and starting it again continues."""

    def stop() -> dict[str, Any]:
        client = context.jobs()
        name = find_job(client, job)
        return {"id": name, "stopping": bool(client.stop_job(name))}

    return await of_cluster(stop)


def configs(context: Context) -> dict[str, Path]:
    """The configs that may be named: the files of one folder."""
    folder = Path(context.config.configs) if context.config.configs else Path(jobs.__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


async def of_cluster(work: Callable[[], Result]) -> Result:
    """In another thread; a cluster that does not answer is 503."""

    def told() -> Result:
        try:
            return work()
        except (ProblemError, MiDiscoverError):
            raise
        except Exception as error:  # of requests and of Ray's client, which raises plain RuntimeErrors
            raise ProblemError(503, f"The cluster's Jobs API does not answer ({type(error).__name__}).") from error

    return await in_thread(told)
