"""The guard before an application that answers everything: who gets through, and what is never read."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from midiscover.serving import serve_config
from midiscover.tracking.keys import ApiKey, _hash
from serve.access import COOKIE, SESSION_SECONDS, Access
from serve.guard import Guard
from serve.problems import NOTHING_HERE
from tests.served import listening

SECRET = "0123456789abcdef" * 3
SCOPES = ("read", "steer", "admin")


def api_key(scope: str, *, revoked: bool = False) -> ApiKey:
    number = f"0000000{SCOPES.index(scope)}"
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return ApiKey(number, scope, (scope,), _hash(SECRET), now, "somebody", now if revoked else None)


def text_of(scope: str) -> str:
    return f"mdc_0000000{SCOPES.index(scope)}_{SECRET}"


class App:
    """Reads the body and answers 200; counts what it was given."""

    def __init__(self, *, waits: asyncio.Event | None = None) -> None:
        self.bodies: list[bytes] = []
        self.waits = waits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        if self.waits is not None:
            await self.waits.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"fine"})


class Meter:
    def request(self, *_: Any) -> None: ...


class Answer:
    def __init__(self, sent: list[Any], taken: int) -> None:
        self.status: int = sent[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in sent[1:])
        self.taken = taken

    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        document = json.loads(self.body)
        assert document["status"] == self.status
        assert document["error"] == document["detail"]
        return document


def guarded(app: App, keys: list[ApiKey] | None = None, **settings: Any) -> Guard:
    known = [api_key(scope) for scope in SCOPES] if keys is None else keys
    access = Access(lambda: known)
    access.refresh()
    return Guard(app, serve_config({"allowed_hosts": ["here"], **settings}), access, Meter(), b"<login>", "policy")


async def ask(
    guard: Guard, method: str = "GET", path: str = "/saes", body: bytes | None = None, **headers: str
) -> Answer:
    given = {"host": "here:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and "transfer-encoding" not in given:
        given.setdefault("content-length", str(len(body)))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    pieces = [(body or b"")[i : i + 1000] for i in range(0, max(len(body or b""), 1), 1000)]
    taken, sent = 0, []

    async def receive() -> Any:
        nonlocal taken
        if taken == len(pieces):
            await asyncio.Event().wait()  # the client stays
        piece = pieces[taken]
        taken += 1
        return {"type": "http.request", "body": piece, "more_body": taken < len(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    await guard(scope, receive, send)
    return Answer(sent, taken)


def run(guard: Guard, *args: Any, **kwargs: Any) -> Answer:
    return asyncio.run(ask(guard, *args, **kwargs))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer mdc_00000000_{'0' * 48}"},
        {"authorization": f"Basic {text_of('read')}"},
        {"x_api_key": "x" * 10_000},
        {"cookie": f"{COOKIE}=00000000.9999999999.{'0' * 64}"},
        {"cookie": "\x00=;;;"},
    ],
)
def test_nobody_without_a_key_gets_through_and_nothing_of_theirs_is_read(headers: dict[str, str]) -> None:
    app = App()
    answer = run(guarded(app), "POST", "/interpret", b"x" * 5000, **headers)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.taken == 0
    assert app.bodies == []
    others = run(guarded(app), "GET", "/no/such/path", **headers)
    assert {**answer.problem(), "request_id": 0} == {**others.problem(), "request_id": 0}, "the same whatever was asked"


@pytest.mark.parametrize("header", ["authorization", "x_api_key", "x_secret_key"])
def test_a_key_comes_in_any_of_three_headers(header: str) -> None:
    value = f"Bearer {text_of('read')}" if header == "authorization" else text_of("read")
    answer = run(guarded(App()), **{header: value})
    assert (answer.status, answer.body) == (200, b"fine")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_revoked_key_is_none() -> None:
    guard = guarded(App(), [api_key("admin", revoked=True)])
    assert run(guard, x_api_key=text_of("admin")).status == 401


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("GET", "/saes", "read"),
        ("POST", "/interpret", "read"),
        ("POST", "/v1/activation/all", "read"),
        ("GET", "/no/such/path", "read"),
        ("POST", "/steer", "steer"),
        ("POST", "/steer/", "steer"),
        ("POST", "/v1/steer/completion", "steer"),
        ("POST", "/api/steer/", "steer"),
        ("POST", "/api/steer-chat", "steer"),
        ("POST", "/train", "admin"),
        ("GET", "/jobs", "admin"),
        ("DELETE", "/jobs/a", "admin"),
    ],
)
def test_each_scope_includes_those_before_it_and_no_other(method: str, path: str, needed: str) -> None:
    for scope in SCOPES:
        answer = run(guarded(App()), method, path, b"{}", x_api_key=text_of(scope))
        enough = SCOPES.index(scope) >= SCOPES.index(needed)
        assert answer.status == (200 if enough else 403)
        if not enough:
            assert f"lacks the scope '{needed}'" in answer.problem()["detail"]


@pytest.mark.parametrize(
    "path", ["/train\n", "/jobs\n", "/steer\n", "/saes/\x00", "/login\r", "/\u2028", "/saes/\ud800"]
)
@pytest.mark.parametrize("scope", [None, *SCOPES])
def test_a_path_that_can_t_be_printed_is_nobodys(path: str, scope: str | None) -> None:
    app = App()
    answer = run(guarded(app), "POST", path, b"{}", **({"x_api_key": text_of(scope)} if scope else {}))
    assert (answer.status, answer.problem()["detail"], answer.taken) == (404, NOTHING_HERE, 0)
    assert app.bodies == []


def test_what_is_open_is_health_and_the_log_in() -> None:
    for method, path, status in (
        ("GET", "/health", 200),
        ("GET", "/login", 200),
        ("POST", "/login", 200),
        ("POST", "/health", 401),
        ("GET", "/health/", 401),
        ("GET", "/healthx", 401),
        ("GET", "/assets/app.js", 401),
    ):
        assert run(guarded(App()), method, path, b"").status == status, (method, path)


def test_a_browser_without_a_session_gets_the_log_in() -> None:
    answer = run(guarded(App()), "GET", "/", accept="text/html,*/*")
    assert (answer.status, answer.body) == (401, b"<login>")
    assert answer.headers["content-security-policy"] == "policy"
    form = run(guarded(App()), "POST", "/logout", b"", accept="text/html,*/*")
    assert (form.status, form.headers["location"], form.body) == (303, "/login", b"")
    assert run(guarded(App()), "POST", "/logout", b"", accept="*/*").status == 401


def test_bodies_without_a_length_or_too_long_are_refused_unread() -> None:
    app, key = App(), text_of("read")
    guard = guarded(app, limits={"body_bytes": 2000})
    chunked = run(guard, "POST", "/interpret", b"x" * 5000, x_api_key=key, transfer_encoding="chunked")
    assert (chunked.status, chunked.taken) == (411, 0)
    lengthless = run(guard, "POST", "/interpret", None, x_api_key=key)
    assert lengthless.status == 411
    long = run(guard, "POST", "/interpret", b"x" * 2001, x_api_key=key)
    assert (long.status, long.taken) == (413, 0)
    assert "at most 2,000" in long.problem()["detail"]
    lying = run(guard, "POST", "/interpret", b"x" * 5000, x_api_key=key, content_length="10")
    assert lying.status == 413
    assert lying.taken <= 3
    assert run(guard, "POST", "/interpret", b"x", x_api_key=key, content_length="-1").status == 400
    assert app.bodies == []
    assert run(guard, "POST", "/interpret", b"x" * 2000, x_api_key=key).status == 200


def test_another_host_name_is_refused() -> None:
    """A page that rebinds its own name to 127.0.0.1 sends that name."""
    for host, status in (
        ("evil.example", 403),
        ("here", 200),
        ("HERE:99", 200),
        ("", 403),
        ("here.evil.example:80", 403),
    ):
        assert run(guarded(App()), host=host, x_api_key=text_of("read")).status == status, host


def test_a_key_has_so_many_requests_at_once_and_all_keys_so_many_more() -> None:
    async def work() -> None:
        gate = asyncio.Event()
        guard = guarded(App(waits=gate), limits={"concurrent": 3, "concurrent_per_key": 2})
        first = [asyncio.create_task(ask(guard, x_api_key=text_of("read"))) for _ in range(2)]
        await asyncio.sleep(0.05)
        third = await ask(guard, x_api_key=text_of("read"))
        assert third.status == 429
        other = asyncio.create_task(ask(guard, x_api_key=text_of("admin")))
        await asyncio.sleep(0.05)
        full = await ask(guard, x_api_key=text_of("admin"))
        assert full.status == 503
        assert {third.headers["retry-after"], full.headers["retry-after"]} == {"2"}
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*first, other)] == [200] * 3
        assert (await ask(guard, x_api_key=text_of("read"))).status == 200

    asyncio.run(asyncio.wait_for(work(), 20))


def test_an_answer_that_does_not_begin_in_time_is_given_up() -> None:
    async def work() -> Answer:
        return await ask(guarded(App(waits=asyncio.Event()), limits={"seconds": 0.2}), x_api_key=text_of("read"))

    answer = asyncio.run(work())
    assert answer.status == 503
    assert "retry-after" in answer.headers


def test_without_a_key_there_are_so_many_at_once_and_so_much_time_and_no_place_of_others_is_taken() -> None:
    async def work() -> None:
        guard = guarded(App(waits=asyncio.Event()), limits={"seconds": 0.5, "concurrent": 2, "concurrent_per_key": 2})
        open_ones = [asyncio.create_task(ask(guard, "POST", "/login", b"key=")) for _ in range(2)]
        await asyncio.sleep(0.05)
        probes = [asyncio.create_task(ask(guard, method, "/health")) for method in ("GET", "HEAD")]
        more = await ask(guard, "GET", "/login")
        assert (more.status, more.problem()["detail"]) == (429, "Without a key there are 2 requests under way already.")
        with_key = await ask(guard, x_api_key=text_of("read"))
        assert (with_key.status, with_key.problem()["detail"][:20]) == (503, "No answer within 0.5")
        assert [answer.status for answer in await asyncio.gather(*open_ones)] == [503, 503]
        assert [answer.status for answer in await asyncio.gather(*probes)] == [503, 503], "an application that waits"

    asyncio.run(asyncio.wait_for(work(), 20))


class Slow:
    """Answers when it is let; tells when it began and how it ended."""

    def __init__(self, *, streams: bool) -> None:
        self.streams, self.began, self.ends = streams, threading.Event(), list[str]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.began.set()
        try:
            if self.streams:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(100):
                await asyncio.sleep(0.1)
                if self.streams:
                    await send({"type": "http.response.body", "body": b"more", "more_body": True})
            self.ends.append("worked to the end")
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("body", [b"{}", b""])
def test_who_hangs_up_ends_the_work_and_gives_the_place_back(streams: bool, body: bytes) -> None:
    app = Slow(streams=streams)
    guard = guarded(app, allowed_hosts=["127.0.0.1"], limits={"concurrent_per_key": 1})  # type: ignore[arg-type]
    head = f"Host: 127.0.0.1\r\nX-Api-Key: {text_of('read')}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with listening(guard) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall((b"POST" if body else b"GET") + b" /saes HTTP/1.1\r\n" + head + body)
            assert app.began.wait(10)
            assert guard._running.total() == 1
        ends = time.monotonic() + 5
        while guard._running.total() and time.monotonic() < ends:
            time.sleep(0.02)
        assert guard._running.total() == 0
        assert app.ends == ["cancelled"]


def test_who_hangs_up_in_the_middle_of_a_body_starts_nothing() -> None:
    app = Slow(streams=False)
    guard = guarded(app, allowed_hosts=["127.0.0.1"])  # type: ignore[arg-type]
    head = f"Host: 127.0.0.1\r\nX-Api-Key: {text_of('read')}\r\nContent-Length: 10\r\n\r\n".encode()
    with listening(guard) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /saes HTTP/1.1\r\n" + head + b"{")
            ends = time.monotonic() + 5
            while not guard._running.total() and time.monotonic() < ends:
                time.sleep(0.02)
            assert guard._running.total() == 1
        while guard._running.total() and time.monotonic() < ends:
            time.sleep(0.02)
        assert guard._running.total() == 0
    assert not app.began.is_set()


def test_an_error_of_the_application_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("s3://secret-bucket password=hunter2")

    guard = guarded(failing)  # type: ignore[arg-type]
    answer = run(guard, x_api_key=text_of("read"), x_request_id="request-0001")
    assert answer.status == 500
    assert "hunter2" not in answer.body.decode()
    assert answer.problem()["request_id"] == answer.headers["x-request-id"] == "request-0001"


def test_a_session_lasts_as_long_as_its_key_and_half_a_day_and_serves_own_pages_alone() -> None:
    now = [1.8e9]
    keys = [api_key("read")]
    access = Access(lambda: keys, lambda: now[0])
    access.refresh()
    guard = Guard(App(), serve_config({"allowed_hosts": ["here"]}), access, Meter(), b"", "")
    cookie = f"{COOKIE}={access.session(keys[0])}"
    assert run(guard, cookie=cookie).status == 200
    assert run(guard, "POST", "/interpret", b"{}", cookie=cookie, origin="http://here:8000").status == 200
    assert run(guard, "POST", "/interpret", b"{}", cookie=cookie).status == 403
    assert run(guard, "POST", "/interpret", b"{}", cookie=cookie, origin="http://evil.example").status == 403
    forged = access.session(keys[0]).replace(".", ".9", 1)
    assert run(guard, cookie=f"{COOKIE}={forged}").status == 401
    now[0] += SESSION_SECONDS + 1
    assert run(guard, cookie=cookie).status == 401
    now[0] -= 10
    keys[:] = [api_key("read", revoked=True)]
    access.refresh()
    assert run(guard, cookie=cookie).status == 401


@pytest.mark.parametrize("others", ["a b=c; ", 'x={"y": [1,2]}; ', "é=ü; ", "odd; =; ", f"{COOKIE}2=x; ", ""])
def test_cookies_of_others_on_this_host_are_no_matter(others: str) -> None:
    keys = [api_key("read")]
    guard = guarded(App(), keys)
    ours = f"{COOKIE}={guard._access.session(keys[0])}"
    assert run(guard, cookie=f"{others}{ours}").status == 200
    assert run(guard, cookie=f"{ours}; {others}").status == 200
    assert run(guard, cookie=others).status == 401
