"""Hub models: a hub of our own on 127.0.0.1, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import midiscover.lm  # noqa: F401  so that hook tables are made in this process
from midiscover import modelfiles
from midiscover.errors import ModelError
from tests.unit.test_models import _own_cache, folder, resolve

__all__ = ["_own_cache", "folder"]  # fixtures

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A model hub with one repository `org/tiny`: what huggingface_hub asks for, and nothing more."""

    def __init__(self, folder: Path) -> None:
        files = {path.name: path for path in folder.iterdir()}
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}
        """Beginning of a path -> status and headers."""
        refusals = self.refusals

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                for beginning, refusal in refusals.items():
                    if path.startswith(beginning):
                        return self._reply(*refusal)
                if path.startswith("/api/models/org/tiny"):
                    if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", COMMIT):
                        return self._reply(404, {"X-Error-Code": "RevisionNotFound"})
                    if "/tree/" in path:
                        tree = [
                            {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                            for name, file in files.items()
                        ]
                        return self._reply(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
                    siblings = [{"rfilename": name} for name in files]
                    info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                    return self._reply(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
                name = path.rsplit("/", 1)[1]
                if path.startswith(f"/org/tiny/resolve/{COMMIT}/") and name in files:
                    data = files[name].read_bytes()
                    etag = hashlib.sha256(data).hexdigest()
                    return self._reply(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, data)
                return self._reply(404, {"X-Error-Code": "RepoNotFound"})

            def do_HEAD(self) -> None:
                self.do_GET()

            def _reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    (folder / "README.md").write_text("Never fetched: a snapshot without it is whole.")
    server = Hub(folder)
    yield server
    server.close()


def ask(program: str, url: str, home: Path) -> Any:
    """Run a program with the hub at `url`; the hub's client reads its settings at import, hence another process."""
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    head = "import json, os; from midiscover.models import *; from midiscover.config import ModelConfig as M\n"
    done = subprocess.run(
        [sys.executable, "-c", head + program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Fetching" not in done.stderr, "no bars where nobody sees them move"
    return json.loads(done.stdout)


@pytest.mark.alone
def test_a_hub_model_is_its_commit_also_without_the_hub(hub: Hub, folder: Path, tmp_path: Path) -> None:
    identity = "i = resolve_model(M(id='org/tiny')); "
    answer = "print(json.dumps([i.name, i.hub_id, i.digest, i.revision, i.folder, i.tokenizer_digest]))"
    home = tmp_path / "hf"
    online = ask(identity + answer, hub.url, home)
    assert online[:5] == ["org/tiny", "org/tiny", COMMIT, COMMIT, None]
    assert online[5] == resolve(folder).tokenizer_digest
    assert not list(home.rglob("model.safetensors")), "naming a model must not download its weights"
    names = ask(identity + "print(json.dumps(sorted(os.listdir(model_folder(i)))))", hub.url, home)
    assert "model.safetensors" in names
    hub.close()
    started = time.monotonic()
    assert ask(identity + answer, hub.url, home) == online
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("status", [401, 403, 429])
def test_a_hub_that_refuses_takes_no_cached_model_away(hub: Hub, tmp_path: Path, status: int) -> None:
    """As where a token has expired, or a proxy lets nobody through."""
    program = "i = resolve_model(M(id='org/tiny')); print(json.dumps([i.digest, os.path.isdir(model_folder(i))]))"
    assert ask(program, hub.url, tmp_path / "hf") == [COMMIT, True]
    hub.refusals["/"] = status, {"X-Error-Message": "Invalid credentials in Authorization header"}
    assert ask(program, hub.url, tmp_path / "hf") == [COMMIT, True]
    with pytest.raises(AssertionError, match="the hub refuses"):
        ask(program, hub.url, tmp_path / "another")


def test_what_the_hub_does_not_know_is_named(hub: Hub, tmp_path: Path) -> None:
    program = (
        "errors = []\n"
        "for id, revision in (('org/unknown', None), ('org/tiny', 'no-such-branch')):\n"
        "    try: resolve_model(M(id=id, revision=revision))\n"
        "    except Exception as error: errors.append([type(error).__name__, str(error)])\n"
        "print(json.dumps(errors))"
    )
    (first, unknown), (second, revision) = ask(program, hub.url, tmp_path / "hf")
    assert first == second == "ModelError"
    assert "'org/unknown' does not exist" in unknown
    assert "no revision 'no-such-branch'" in revision


@pytest.mark.parametrize(
    ("path", "status", "headers", "told"),
    [
        ("/org/tiny/resolve", 401, {"X-Error-Code": "GatedRepo"}, "ask for access on its page, and set HF_TOKEN"),
        ("/api/models", 403, {"X-Error-Code": "GatedRepo"}, "ask for access on its page, and set HF_TOKEN"),
        (
            "/api/models",
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "the hub refuses (401: the access token, HF_TOKEN, is wrong, has expired or may not read it",
        ),
        ("/api/models", 403, {}, "the hub refuses (403: the access token, HF_TOKEN, is wrong, has expired"),
        ("/api/models", 429, {}, "the hub refuses (429 Too Many Requests"),
    ],
)
def test_what_the_hub_refuses_is_said(
    hub: Hub, tmp_path: Path, path: str, status: int, headers: dict[str, str], told: str
) -> None:
    hub.refusals[path] = status, headers
    program = "try: resolve_model(M(id='org/tiny'))\nexcept Exception as error: print(json.dumps(str(error)))"
    said = ask(program, hub.url, tmp_path / "hf")
    assert told in said
    assert "'org/tiny'" in said
    assert "does not answer" not in said


@pytest.mark.alone
def test_a_hub_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*_args: Any, **_kwargs: Any) -> Any:
        released.wait(20)
        raise ConnectionError("too late")

    def nothing_cached(*_args: Any, **_kwargs: Any) -> Any:
        raise LocalEntryNotFoundError("nothing here")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", hang)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_cached)
    monkeypatch.setattr(modelfiles, "HUB_SECONDS", 0.1)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"'org/some-model': the hub does not answer .* local folder in model\.id"):
        resolve("org/some-model")
    assert time.monotonic() - started < 2
    released.set()
