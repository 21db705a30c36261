"""A stand-in for the Hugging Face hub on this machine: repositories, commits with git-LFS, downloads. In memory.

It speaks what the real client (`huggingface_hub`) asks for over HTTP and nothing of Xet, which clients are told to
leave by `HF_HUB_DISABLE_XET`; what the real hub refuses, such as a token that is not known or an LFS object that never
came, it refuses too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.listening import listening

TOKEN = "hf_stand_in"
LFS_BYTES = 1024
"""Files from here on, and all safetensors, are LFS objects."""


class Hub:
    """What it holds, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, dict[str, bytes]] = {}
        """Repository -> path -> content."""
        self.commits: list[tuple[str, str, list[str]]] = []
        """Repository, message and paths of each."""
        self.objects: dict[str, bytes] = {}
        """LFS objects that arrived, by sha256."""
        self.requests: list[str] = []

    def environment(self) -> dict[str, str]:
        """Variables with which a client comes here."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@contextmanager
def hub() -> Iterator[Hub]:
    """Runs it on a free port of 127.0.0.1 until the block ends."""
    state = Hub()
    with listening(_Handler, hub=state) as state.url:
        yield state


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self._asked()
        if path == "/api/validate-yaml":
            self._json(200, {"errors": [], "warnings": []})
        elif not self._may():
            self._json(401, {"error": "Invalid username or password."}, {"X-Error-Message": "Invalid credentials"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            repository, verb = found.groups()
            if repository not in self.hub.files:
                self._missing("RepoNotFound")
            elif verb == "preupload":
                self._preupload(json.loads(body))
            else:
                self._commit(repository, body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        else:
            self._missing("EntryNotFound")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self._asked().rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != digest:
            self._json(400, {"error": "the object has another sha256"})
            return
        self.hub.objects[digest] = body
        self._send(200, b"")

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = self._asked()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            files = self.hub.files.get(found[1])
            if files is None:
                self._missing("RepoNotFound")
                return
            about = {"id": found[1], "sha": "0" * 40, "siblings": [{"rfilename": name} for name in sorted(files)]}
            self._json(200, about | {"private": False, "tags": [], "downloads": 0, "likes": 0})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(?:main|0{40})/(.+)", path):
            repository, name = found.groups()
            if repository not in self.hub.files:
                self._missing("RepoNotFound")
            elif name not in self.hub.files[repository]:
                self._missing("EntryNotFound")
            else:
                data = self.hub.files[repository][name]
                self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "0" * 40})
        else:
            self._missing("EntryNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.files:
            self._json(409, {"error": "You already created this model repo", **address})
            return
        self.hub.files[name] = {}
        self._json(200, address)

    def _preupload(self, asked: dict[str, Any]) -> None:
        files = []
        for file in asked["files"]:
            large = file["size"] >= LFS_BYTES or file["path"].endswith(".safetensors")
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self._json(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                **one,
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}", "header": {}}},
            }
            for one in asked["objects"]
        ]
        self._json(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _commit(self, repository: str, body: bytes) -> None:
        message, files = "", {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        self._json(400, {"error": f"the LFS object of {value['path']} is missing"})
                        return
                    files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.files[repository] |= files
        self.hub.commits.append((repository, message, sorted(files)))
        self._json(
            200,
            {"success": True, "commitUrl": f"{self.hub.url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40},
        )

    def _asked(self) -> str:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _may(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _missing(self, code: str) -> None:
        self._json(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass
