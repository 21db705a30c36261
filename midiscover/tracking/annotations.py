"""What a person says of a sweep or an SAE, a note and tags, as `annotations.json` beside it in the store.

The tracker answers questions; this file is what `reindex` reads, and it takes the place of the note and tags with
which a sweep began.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from midiscover.errors import CorruptError
from midiscover.store import layout

if TYPE_CHECKING:
    from midiscover.store.storage import Storage

VERSION = 1
FILE = "annotations.json"


class Annotations(NamedTuple):
    """A note (None: there is none) and tags in alphabetical order."""

    note: str | None
    tags: list[str]

    def changed(self, note: str | None, add: Iterable[str], remove: Iterable[str]) -> Annotations:
        """With another note (None: as it is, empty: none) and other tags."""
        tags = (set(self.tags) | set(add)) - set(remove)
        return Annotations(self.note if note is None else note or None, sorted(tags))


def annotations_key(kind: str, name: str) -> str:
    """Where the annotations of the sweep or SAE `name` lie in the store."""
    return layout.sweep_file(name, FILE) if kind == "sweep" else layout.sae_file(name, FILE)


def change_annotations(
    storage: Storage, kind: str, name: str, known: Annotations, change: Callable[[Annotations], Annotations]
) -> Annotations:
    """Put what `change` makes of the file, or of `known` where there is none, in its place; returns what stands then.

    `kind` is `sweep` or `sae`. Of people who change it at once, none undoes what another said.
    """
    key = annotations_key(kind, name)
    while True:
        old = _standing(storage, key)
        after = change(known if old is None else _parse(key, old))
        document = {"v": VERSION, "note": after.note, "tags": after.tags}
        if storage.replace(key, old, json.dumps(document, indent=2, sort_keys=True).encode()):
            return after


def read_annotations(storage: Storage, kind: str, name: str) -> Annotations | None:
    """The file, or None where nobody said anything. CorruptError for one that this version does not understand."""
    key = annotations_key(kind, name)
    found = _standing(storage, key)
    return None if found is None else _parse(key, found)


def _standing(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key)
    except FileNotFoundError:
        return None


def _parse(key: str, data: bytes) -> Annotations:
    try:
        document = json.loads(data)
    except ValueError as error:
        raise CorruptError(f"{key} is not JSON; put it right or delete it.") from error
    if not isinstance(document, dict) or document.get("v") != VERSION:
        raise CorruptError(f"{key} is not of version {VERSION}, the one that this miDiscover reads; update it.")
    note, tags = document.get("note"), document.get("tags", [])
    if not isinstance(note, str | None) or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise CorruptError(f"{key} is no note and a list of tags; put it right or delete it.")
    return Annotations(note, sorted(tags))
