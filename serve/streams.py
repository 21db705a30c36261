"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from serve.problems import ProblemError, failed

Piece = TypeVar("Piece")


async def events(pieces: AsyncIterator[Piece], as_event: Callable[[Piece], Any]) -> AsyncIterator[bytes]:
    """Each piece as one frame; a problem or an error on the way is the last one. Errors are raised after it."""
    try:
        async for piece in pieces:
            yield f"data: {json.dumps(as_event(piece))}\n\n".encode()
    except ProblemError as problem:
        yield _problem(problem.status, problem.detail)
    except Exception:
        yield _problem(500, failed("the X-Request-Id of this answer"))
        raise


def _problem(status: int, detail: str) -> bytes:
    return f"data: {json.dumps({'error': detail, 'status': status})}\n\n".encode()
