"""What a person says of a sweep or an SAE, a note and tags, as `annotations.json` beside it in the store.

The tracker answers questions; this file is what `reindex` reads, and it takes the place of the note and tags with
which a sweep began.
"""

from __future__ import annotations

import json
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


def annotations_key(kind: str, name: str) -> str:
    """Where the annotations of the sweep or SAE `name` lie in the store."""
    return layout.sweep_file(name, FILE) if kind == "sweep" else layout.sae_file(name, FILE)


def write_annotations(storage: Storage, kind: str, name: str, annotations: Annotations) -> None:
    """Put the file, over an older one. `kind` is `sweep` or `sae`."""
    document = {"v": VERSION, "note": annotations.note, "tags": annotations.tags}
    storage.write(annotations_key(kind, name), json.dumps(document, indent=2, sort_keys=True).encode())


def read_annotations(storage: Storage, kind: str, name: str) -> Annotations | None:
    """The file, or None where nobody said anything. CorruptError for one that this version does not understand."""
    key = annotations_key(kind, name)
    try:
        document = json.loads(storage.read(key))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptError(f"{key} is not JSON; put it right or delete it.") from error
    if not isinstance(document, dict) or document.get("v") != VERSION:
        raise CorruptError(f"{key} is not of version {VERSION}, the one that this miDiscover reads; update it.")
    return Annotations(document.get("note"), sorted(document.get("tags", ())))
