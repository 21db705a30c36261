"""Errors as people and programs get them: RFC 9457's problem+json, with the `error` that Neuronpedia's clients read.

Says what is wrong and what would be right, in the words of the exception; never a traceback, a host or a bucket.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field

from midiscover.errors import CorruptError, MiDiscoverError, NotFoundError, StoreError, TrackingError, UserError

MEDIA = "application/problem+json"
RETRY_SECONDS = 2
NOTHING_HERE = "There is nothing at this address; /docs lists what there is."


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


def of_error(error: MiDiscoverError) -> ProblemError:
    """What an error of the library is to who asked."""
    if isinstance(error, NotFoundError):
        return ProblemError(404, str(error))
    if isinstance(error, (StoreError, TrackingError, CorruptError)):
        # Their sentences name buckets and hosts, which are nobody's business here; the log has them.
        told = {
            CorruptError: "What the store holds of this is damaged; whoever runs the deployment finds why in its log.",
            TrackingError: "The tracking database does not answer now; try again later.",
        }
        fallback = "The store does not answer now; try again later."
        return ProblemError(503, next((text for kind, text in told.items() if isinstance(error, kind)), fallback))
    return ProblemError(422 if isinstance(error, UserError) else 503, str(error))


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "description": HTTPStatus(status).phrase, "content": {MEDIA: {}}}
    for status in (400, 401, 403, 404, 411, 413, 422, 429, 503)
}
"""What any route may answer with, for its OpenAPI description."""
