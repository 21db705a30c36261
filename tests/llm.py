"""A stand-in for an OpenAI-compatible server on this machine: chat completions over HTTP, by a model that knows words.

Asked to explain a feature it names the word that is marked most often; asked of which passages an explanation is true,
it looks for that word in them, or among the marks. So what it says can be checked, and how well it judges is known.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.listening import listening

KEY = "sk-stand-in"
_MARKED = re.compile(r"<<(.*?)>>")
_NUMBERED = re.compile(r"^\d+\. (.*)$", re.MULTILINE)
_WORD = re.compile(r'the word "(.*?)"')


class Llm:
    """What it was asked, and what it is to answer next instead of its own words."""

    def __init__(self) -> None:
        self.url = ""
        self.questions: list[str] = []
        self.failures: list[tuple[int, str]] = []
        """Status and message of the answers that come first."""
        self.bodies: list[bytes] = []
        """Whole answers that come first, as they are."""
        self.lock = threading.Lock()

    def environment(self) -> dict[str, str]:
        """Variables with which a client comes here."""
        return {"OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_KEY": KEY}


def answer(question: str) -> str:
    """What the model says."""
    passages = _NUMBERED.findall(question)
    if "Of which" not in question:
        marks = Counter(mark.strip().casefold() for passage in passages for mark in _MARKED.findall(passage))
        return f'I looked at them.\nExplanation: the word "{marks.most_common(1)[0][0]}"'
    named = _WORD.search(question.partition("\n")[0])
    word = named[1] if named else question.partition("peaks at '")[2].partition("'")[0].strip().casefold()

    def holds(passage: str) -> bool:
        marks = [mark.strip().casefold() for mark in _MARKED.findall(passage)]
        return word in marks if marks else word in passage.casefold()

    return f"So it is.\n{json.dumps([int(holds(passage)) for passage in passages])}"


@contextmanager
def llm() -> Iterator[Llm]:
    """Runs it on a free port of 127.0.0.1 until the block ends."""
    state = Llm()
    with listening(_Handler, llm=state) as state.url:
        yield state


class _Handler(BaseHTTPRequestHandler):
    llm: Llm

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.llm.lock:
            status, told = self.llm.failures.pop(0) if self.llm.failures else (200, "")
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            status, told = 401, f"Incorrect API key provided: {self.headers.get('Authorization')}"
        elif self.path != "/v1/chat/completions":
            status, told = 404, "no such path"
        if status != 200:
            self._send(status, {"error": {"message": told}})
            return
        with self.llm.lock:
            whole = self.llm.bodies.pop(0) if self.llm.bodies else None
        if whole is not None:
            self._send(200, whole)
            return
        question = body["messages"][0]["content"]
        with self.llm.lock:
            self.llm.questions.append(question)
        said = answer(question)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        usage = {"prompt_tokens": len(question.split()), "completion_tokens": len(said.split()), "total_tokens": 0}
        self._send(
            200,
            {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            | {"choices": [choice], "usage": usage},
        )

    def _send(self, status: int, body: dict[str, Any] | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return
