"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from serve.problems import ProblemError

Piece = TypeVar("Piece")


async def events(pieces: AsyncIterator[Piece], as_event: Callable[[Piece], Any]) -> AsyncIterator[bytes]:
    """Each piece as one frame; a problem on the way is the last one."""
    try:
        async for piece in pieces:
            yield f"data: {json.dumps(as_event(piece))}\n\n".encode()
    except ProblemError as problem:
        yield f"data: {json.dumps({'error': problem.detail, 'status': problem.status})}\n\n".encode()
