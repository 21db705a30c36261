"""The first page and the log-in, for browsers. A key is swapped for a cookie that scripts can't read."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from serve.access import COOKIE, SESSION_SECONDS
from serve.context import Context, context_of
from serve.guard import POLICY

ASSETS = Path(__file__).parent / "assets"
LOGIN = (ASSETS / "login.html").read_text()
_STYLE = re.search(r"<style>(.*)</style>", LOGIN, re.DOTALL)
assert _STYLE is not None
_HASH = base64.b64encode(hashlib.sha256(_STYLE[1].encode()).digest()).decode()
LOGIN_POLICY = POLICY.replace("style-src 'self'", f"style-src 'sha256-{_HASH}'")
"""The log-in page needs no other file, so that every other file can need a key."""
DOCS_POLICY = POLICY.replace("script-src 'self'", "script-src 'self' 'unsafe-inline'").replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)
"""Swagger's page starts itself by a script of its own."""
LOGIN_BYTES = 4096
router = APIRouter(include_in_schema=False)
Given = Annotated[Context, Depends(context_of)]


def login_page(problem: str = "") -> str:
    """The page, with what was wrong the last time."""
    return LOGIN.replace("<!-- problem -->", f'<p class="problem" role="alert">{problem}</p>' if problem else "")


def _page(status: int, problem: str = "") -> HTMLResponse:
    return HTMLResponse(login_page(problem), status, {"Content-Security-Policy": LOGIN_POLICY})


@router.get("/")
async def first() -> HTMLResponse:
    """The SAEs, a text box and the coloured tokens."""
    return HTMLResponse((ASSETS / "index.html").read_text())


@router.get("/login")
async def login() -> HTMLResponse:
    """Asks for a key."""
    return _page(200)


@router.post("/login")
async def log_in(request: Request, context: Given) -> Response:
    """Swap a key for a cookie."""
    if int(request.headers.get("content-length", 0)) > LOGIN_BYTES:
        return _page(413, "That is no key.")
    try:
        fields = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=4)
    except ValueError:  # more fields than our form has
        fields = {}
    key = context.access.key("".join(fields.get("key", [""])).strip())
    if key is None:
        return _page(401, "This key is not valid here.")
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        COOKIE,
        context.access.session(key),
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        # Behind a proxy that ends TLS the browser alone knows how it came here.
        secure="https" in (request.url.scheme, request.headers.get("origin", "").partition("://")[0]),
    )
    return answer


@router.post("/logout")
async def log_out() -> Response:
    """Forget the cookie; every other browser's stays."""
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer
