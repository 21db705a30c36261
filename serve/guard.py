"""What stands before the application: who asks, may they, and is it little enough. Decided before a body is read.

A pure ASGI wrapper around everything, so that no route can be forgotten: what is not listed as open needs a key. Limits
are answered by 411, 413, 429 and 503; a body without a length is refused, because Ray Serve's proxy would take it in
whole before anybody could say no. A request is under way until its client has taken the answer, the last PART apart.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from midiscover.serving import ServeConfig
from midiscover.tracking.keys import ApiKey
from serve.access import COOKIE, Access
from serve.problems import NOTHING_HERE, failed, problem_bytes, problem_headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = "/health"
OPEN = {("GET", HEALTH), ("HEAD", HEALTH), ("GET", "/login"), ("POST", "/login")}
"""All that needs no key."""
SCOPES = (
    (re.compile(r"/(train|jobs)(/.*)?"), "admin"),
    (re.compile(r"/steer(/.*)?|/v1/steer/.*|/api/steer(-chat)?/?"), "steer"),
)
"""What needs more than `read`, by path."""
ELSEWHERE = "This deployment answers at / alone; whoever runs it sets route_prefix to / and leaves root_path out."
BODIES = ("POST", "PUT", "PATCH")
PART = 2**16
"""Bytes of an answer that a server is given at once; it takes more when the client has taken most of those before."""
GONE = 499
"""What the log calls a request whose client left before it was answered, or took nothing more of its answer."""
UNAUTHORISED = "A valid key is needed: Authorization: Bearer mdc_…, as `midiscover keys create` makes one."
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
NOBODY = ""
"""Whom requests without a key are counted under; no key has this id."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
log = logging.getLogger("midiscover.serve")


class Meter(Protocol):
    """Where numbers about requests go."""

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """One request has been answered."""
        ...


class _Refused(Exception):
    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        self.status, self.detail, self.headers = status, detail, headers or {}


class _UntakenError(Exception):
    """The client takes nothing more of its answer."""


class Guard:
    """Wraps an ASGI application."""

    def __init__(
        self, app: App, config: ServeConfig, access: Access, meter: Meter, login: bytes, login_policy: str
    ) -> None:
        self._app, self._access, self._meter = app, access, meter
        self._login, self._login_policy = login, login_policy
        self._limits, self._hosts = config.limits, {host.lower() for host in config.allowed_hosts}
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _Exchange(self, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status = 0
        self.started = asyncio.Event()
        self.is_answered = False
        self.key: ApiKey | None = None

    async def run(self) -> None:
        """Answer, whatever happens, and write down how it went."""
        began = time.perf_counter()
        try:
            await self._decided()
        except _UntakenError:  # the server closes what is not answered to its end
            self.status = GONE
        finally:
            seconds, route = time.perf_counter() - began, self.scope.get("route")
            path = getattr(route, "path", None) or "(none)"
            self.guard._meter.request(path, self.scope["method"], self.status, seconds)
            fields = {"request": self.id, "route": path, "method": self.scope["method"], "status": self.status}
            fields |= {"key": self.key.id if self.key else None, "ms": round(1000 * seconds, 1)}
            log.info("request", extra={"fields": fields})

    async def _decided(self) -> None:
        try:
            self._require_path()
            self._require_host()
            self.key = self._who()
            self._require_scope()
            self._require_body()
            await self._within_limits()
        except _Refused as refused:
            await self._refuse(refused)
        except _UntakenError:
            raise
        except Exception as error:
            log.exception("failed", extra={"fields": {"request": self.id, "error": type(error).__name__}})
            if not self.started.is_set():
                await self._refuse(_Refused(500, failed(self.id)))

    def _require_path(self) -> None:
        """A route matches a path with a line feed at its end, and leaves out a root_path at its beginning; what is
        looked up here must be what is run there."""
        if self.scope.get("root_path"):
            raise _Refused(404, ELSEWHERE)
        if not self.scope["path"].isprintable():
            raise _Refused(404, NOTHING_HERE)

    def _require_host(self) -> None:
        host = self.headers.get("host", "").lower()
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if name not in self.guard._hosts and "*" not in self.guard._hosts:
            raise _Refused(403, "This deployment does not answer under this host name; see allowed_hosts.")

    def _who(self) -> ApiKey | None:
        """The key that came with the request; None where none is needed."""
        scheme, _, bearer = self.headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else ""
        given = given or self.headers.get("x-api-key", "") or self.headers.get("x-secret-key", "")
        key = self.guard._access.key(given) if given else self._of_cookie()
        if key is None and (self.scope["method"], self.scope["path"]) not in OPEN:
            raise _Refused(401, UNAUTHORISED, {"WWW-Authenticate": "Bearer"})
        return key

    def _of_cookie(self) -> ApiKey | None:
        """That of a browser's session. What changes something must come from our own pages."""
        pairs = (part.strip().partition("=") for part in self.headers.get("cookie", "").split(";"))
        sessions = [value for name, _, value in pairs if name == COOKIE]  # others of this host may look like anything
        key = self.guard._access.key_of(sessions[0]) if sessions else None
        is_ours = self.headers.get("origin", "").partition("://")[2].lower() == self.headers.get("host", "").lower()
        if key is not None and self.scope["method"] not in ("GET", "HEAD") and not is_ours:
            raise _Refused(403, "A session may only be used by this deployment's own pages; use a key.")
        return key

    def _require_scope(self) -> None:
        if self.key is None:
            return
        needed = next((scope for path, scope in SCOPES if path.fullmatch(self.scope["path"])), "read")
        if not self.key.allows(needed):
            raise _Refused(403, f"The key '{self.key.name}' lacks the scope '{needed}', which this needs.")

    def _require_body(self) -> None:
        if "transfer-encoding" in self.headers:
            raise _Refused(411, "Send the body with its Content-Length, not in chunks.")
        length = self.headers.get("content-length")
        if length is None:
            if self.scope["method"] in BODIES:
                raise _Refused(411, "A Content-Length is needed.")
            return
        if not length.isascii() or not length.isdigit():
            raise _Refused(400, "The Content-Length is no number.")
        if int(length) > self.guard._limits.body_bytes:
            most = self.guard._limits.body_bytes
            raise _Refused(
                413, f"The body has {int(length):,} bytes; at most {most:,} are taken.", {"Connection": "close"}
            )

    async def _within_limits(self) -> None:
        running, limits = self.guard._running, self.guard._limits
        name = self.key.id if self.key is not None else NOBODY
        if self._is_probe():
            await self._in_time()
            return
        if running[name] >= limits.concurrent_per_key:
            whose = f"The key '{self.key.name}' has" if self.key is not None else "Without a key there are"
            raise _Refused(429, f"{whose} {running[name]} requests under way already.")
        if self.key is not None and running.total() - running[NOBODY] >= limits.concurrent:
            raise _Refused(503, "All places are taken; try again in a moment.")
        running[name] += 1
        try:
            await self._in_time()
        finally:
            running[name] -= 1
            running += Counter()  # forget those at 0

    def _is_probe(self) -> bool:
        """Whether it is a monitor's question, which those who send half a log-in must not keep from its answer."""
        has_body = self.headers.get("content-length", "0").strip("0")
        return self.key is None and self.scope["path"] == HEALTH and not has_body

    async def _in_time(self) -> None:
        """Run the application; 503 where its answer has not begun in time. A stream may then go on."""
        self.scope["midiscover"] = {"request_id": self.id, "key": self.key}
        work = asyncio.ensure_future(self._while_there())
        begun = asyncio.ensure_future(self.started.wait())
        try:
            await asyncio.wait((work, begun), timeout=self.guard._limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not self.started.is_set():
                raise _Refused(503, f"No answer within {self.guard._limits.seconds:g} s; ask for less, or later.")
            await work
        finally:
            begun.cancel()
            if not work.done():
                work.cancel()

    async def _while_there(self) -> None:
        """Read the body, then run the application until it has answered or the client is gone."""
        messages = await self._body()
        if not messages:
            self.status = GONE
            return
        gone = asyncio.ensure_future(self._receive())  # nothing else comes after a body

        async def receive() -> Message:
            return messages.pop(0) if messages else await asyncio.shield(gone)

        work = asyncio.ensure_future(self.guard._app(self.scope, receive, self._answer))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done() or self.is_answered:  # a server says "gone" after the last byte too
                await work
            elif not self.started.is_set():
                self.status = GONE
        finally:
            gone.cancel()
            work.cancel()

    async def _body(self) -> list[Message]:
        """All messages of the body; none where the client left before its end. 413 for more than is taken."""
        messages: list[Message] = []
        received, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                return []
            messages.append(message)
            received, more = received + len(message.get("body", b"")), message.get("more_body", False)
            if received > self.guard._limits.body_bytes:
                raise _Refused(413, "The body is longer than it said.")
        return messages

    async def _answer(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.started.set()
            own = {name.lower() for name, _ in message.get("headers", ())}
            added = SAFE_HEADERS | {
                "X-Request-Id": self.id,
                "Content-Security-Policy": POLICY,
                "Cache-Control": "no-store",
            }
            extra = [(n.lower().encode(), v.encode()) for n, v in added.items() if n.lower().encode() not in own]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        if message["type"] != "http.response.body":
            await self._taken(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        for begins in range(0, max(len(body), 1), PART):
            is_more = more or begins + PART < len(body)
            self.is_answered = not is_more
            await self._taken({**message, "body": body[begins : begins + PART], "more_body": is_more})

    async def _taken(self, message: Message) -> None:
        """Wait until the server takes it, which it does while the client takes what came before."""
        try:
            async with asyncio.timeout(self.guard._limits.seconds):
                await self._send(message)
        except TimeoutError:
            raise _UntakenError from None

    async def _refuse(self, refused: _Refused) -> None:
        """Every refusal of one kind has the same body but for the request's id."""
        if self.started.is_set():
            return
        status, is_page = refused.status, refused.status == 401 and "text/html" in self.headers.get("accept", "")
        if is_page and self.scope["method"] == "POST":  # a form of ours, after the session has ended
            status, body, headers = 303, b"", {"Location": "/login"}
        elif is_page:
            body = self.guard._login
            headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": self.guard._login_policy}
        else:
            body = problem_bytes(refused.status, refused.detail, self.id)
            headers = problem_headers(refused.status, refused.headers)
        headers["Content-Length"] = str(len(body))
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._answer({"type": "http.response.start", "status": status, "headers": pairs})
        await self._answer({"type": "http.response.body", "body": b"" if self.scope["method"] == "HEAD" else body})
