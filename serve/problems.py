"""Errors as people and programs get them: RFC 9457's problem+json, with the `error` that Neuronpedia's clients read.

Says what is wrong and what would be right, in the words of the exception; never a traceback, a host or a bucket.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from midiscover.errors import (
    CorruptError,
    MiDiscoverError,
    ModelError,
    NotFoundError,
    StoreError,
    TrackingError,
    UserError,
)
from serve.exchange import Problem

Result = TypeVar("Result")
MEDIA = "application/problem+json"
RETRY_SECONDS = 2
NOTHING_HERE = "There is nothing at this address; /docs lists what there is."
log = logging.getLogger("midiscover.serve")


class ProblemDocument(BaseModel):
    """An error (RFC 9457)."""

    type: str = "about:blank"
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no SAE 'l3' here; hosted are l1.mlp-fc2.standard-20480.l1-3.0123456789."])
    error: str = Field(description="The detail once more, for clients of Neuronpedia.")
    request_id: str | None = None


class ProblemError(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def failed(request_id: str | None) -> str:
    """What is said of an error that nobody foresaw."""
    return f"Something went wrong here; the log has it under {request_id}."


def problem_bytes(status: int, detail: str, request_id: str | None) -> bytes:
    """The body."""
    title = HTTPStatus(status).phrase
    document = ProblemDocument(title=title, status=status, detail=detail, error=detail, request_id=request_id)
    return json.dumps(document.model_dump()).encode()


def problem_headers(status: int, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """With the word to come back later where that would help."""
    again = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    return {"Content-Type": MEDIA} | again | dict(given or {})


WITHHELD: dict[type[MiDiscoverError], str] = {
    CorruptError: "What the store holds of this is damaged; whoever runs the deployment finds why in its log.",
    ModelError: "The language model can't answer this; whoever runs the deployment finds why in its log.",
    StoreError: "The store does not answer now; try again later.",
    TrackingError: "The tracking database does not answer now; try again later.",
}
"""Errors whose own sentences name buckets, folders and hosts, which are nobody's business here; the log has them."""


def of_error(error: MiDiscoverError) -> ProblemError:
    """What an error of the library is to who asked."""
    for kind, told in WITHHELD.items():
        if isinstance(error, kind):
            log.warning("withheld", extra={"fields": {"reason": str(error)}})
            return ProblemError(503, told)
    status = 404 if isinstance(error, NotFoundError) else 422 if isinstance(error, UserError) else 503
    return ProblemError(status, str(error))


def answers_problems(method: Callable[..., Awaitable[Result]]) -> Callable[..., Awaitable[Result | Problem]]:
    """Errors with a sentence for people become a `Problem`."""

    @wraps(method)
    async def inner(*args: Any, **kwargs: Any) -> Result | Problem:
        try:
            return await method(*args, **kwargs)
        except MiDiscoverError as error:
            return problem_of(error)

    return inner


def problem_of(error: MiDiscoverError) -> Problem:
    """As an answer of the ingress; see `of_error`."""
    told = of_error(error)
    return Problem(told.status, told.detail)


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "description": HTTPStatus(status).phrase, "content": {MEDIA: {}}}
    for status in (400, 401, 403, 404, 411, 413, 422, 429, 503)
}
"""What any route may answer with, for its OpenAPI description."""
