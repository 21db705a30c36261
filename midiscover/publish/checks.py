"""What a check is, and what it looks at. The checks themselves stand in checks_*.py, one matter a file.

A check is a small function of a `Subject` that returns, perhaps with a word on what it saw, or raises `Failed` or
`Skipped`. A file that can't be read fails the one check that reads it; those that need its content are then skipped, so
that one fault is told once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from midiscover.errors import MiDiscoverError, StoreError
from midiscover.store.storage import Storage

Kind = Literal["sae", "saelens", "bundle", "neuronpedia"]
"""An SAE with its record, as in a store; or one of the exports by itself."""
Status = Literal["pass", "fail", "skipped"]

CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
RECORD, TRAINING, MANIFEST = "record.json", "training.json", "manifest.json"
TOLD = 5
"""Things that one sentence names at most."""


class Failed(Exception):
    """What is wrong, in a sentence or a part of one."""


class Skipped(Exception):
    """Why it could not be checked."""


class Outcome(NamedTuple):
    """What one check found."""

    group: str
    name: str
    asserts: str
    status: Status
    detail: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """A named claim about a folder."""

    group: str
    name: str
    asserts: str
    kinds: tuple[Kind, ...]
    function: CheckFunction

    def run(self, subject: Subject) -> Outcome:
        """Look, and say what was found; nothing is raised by what stands in the folder."""
        status, detail = _found(self.function, subject)
        return Outcome(self.group, self.name, self.asserts, status, detail)


CheckFunction = Callable[["Subject"], "str | None"]

GROUPS = (
    *("files", "cfg", "weights", "sparsity", "record", "training"),
    *("measured again", "saelens", "features", "exports", "bundle"),
)
"""In the order in which they are run and shown."""

REGISTRY: list[Check] = []
"""All checks, as the files are loaded."""


def check(
    group: str, kinds: tuple[Kind, ...] = ("sae", "saelens", "bundle")
) -> Callable[[CheckFunction], CheckFunction]:
    """Make a function a check, named after it; its docstring says what it asserts."""
    assert group in GROUPS

    def register(function: CheckFunction) -> CheckFunction:
        asserts = (function.__doc__ or "").strip().rstrip(".")
        REGISTRY.append(Check(group=group, name=function.__name__, asserts=asserts, kinds=kinds, function=function))
        return function

    return register


@dataclass(kw_only=True)
class Subject:
    """A folder to be checked. Its parts are read once, when the first check asks for them."""

    kind: Kind
    files: Storage
    prefix: str = ""
    """Of the folder within `files`."""
    name: str
    """The SAE's id, or what the folder is called."""
    store: Storage | None = None
    """The store it belongs to, which may hold the activations it was measured on."""
    _parts: dict[str, Any] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """Of a file of the folder within `files`."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def names(self, below: str = "") -> list[str]:
        """Files of the folder, or of one below it, by their path within the folder."""
        start = len(self.prefix) + 1 if self.prefix else 0
        return [key[start:] for key in self.files.list(self.key(below) if below else self.prefix)]

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self.files.exists(self.key(name))

    def read(self, name: str) -> bytes:
        """Skipped where the file is not there."""
        try:
            return self.files.read(self.key(name))
        except FileNotFoundError:
            raise Skipped(f"there is no {name}") from None

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once. Skipped where it raised Failed: the check in charge of it says so."""
        found = self._known(name, make)
        if isinstance(found, Failed):
            raise Skipped(f"{name} can't be read")
        if isinstance(found, Skipped):
            raise Skipped(*found.args)
        return found

    def require(self, name: str, make: Callable[[], Any]) -> Any:
        """The same for the check in charge: Failed where `make` raised it."""
        found = self._known(name, make)
        if isinstance(found, (Failed, Skipped)):
            raise type(found)(*found.args)
        return found

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder, by the rules of `part`."""
        return self.part(name, lambda: parse_json(name, self.read(name)))

    def require_json(self, name: str) -> dict[str, Any]:
        """The same by the rules of `require`."""
        return self.require(name, lambda: parse_json(name, self.read(name)))

    def _known(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._parts:
            try:
                self._parts[name] = make()
            except (Failed, Skipped) as error:
                self._parts[name] = type(error)(*error.args)
        return self._parts[name]


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """Failed for anything but a JSON object of finite numbers."""
    try:
        value = json.loads(data, parse_constant=_refuse)
    except ValueError as error:
        raise Failed(f"{name} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise Failed(f"{name} holds no JSON object")
    return value


def whole(values: Mapping[str, Any], name: str) -> int:
    """A whole number above 0. Skipped for anything else: a check of types says so."""
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Skipped(f"{name} is no whole number above 0")
    return value


def fail_for(problems: list[str]) -> None:
    """Failed naming the first few problems, if there is one."""
    if problems:
        more = f" and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        raise Failed("; ".join(problems[:TOLD]) + more)


def expect(condition: bool, problem: str) -> None:
    """Failed with `problem` where the condition does not hold."""
    if not condition:
        raise Failed(problem)


def _found(function: Callable[[Subject], str | None], subject: Subject) -> tuple[Status, str]:
    try:
        return "pass", function(subject) or ""
    except Failed as error:
        return "fail", str(error)
    except Skipped as error:
        return "skipped", str(error)
    except StoreError:
        raise  # says nothing of the folder
    except MiDiscoverError as error:
        return "fail", str(error)
    except Exception as error:  # whatever stands in a damaged folder: one check never ends the others
        return "fail", f"can't be checked: {type(error).__name__}: {' '.join(str(error).split())}"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")
