"""promoted.json: which SAEs of a store a deployment serves. Read here; `publish/promote.py` changes it.

{"v": 1, "saes": [{"id", "hook", "output_hook", "sweep", "promoted", "by", "metrics"}], "updated"}
"""

from __future__ import annotations

import json
from typing import Any

from midiscover.errors import CorruptError
from midiscover.store import layout
from midiscover.store.storage import Storage

VERSION = 1
Entry = dict[str, Any]


def promoted(storage: Storage) -> list[Entry]:
    """What is promoted in a store. CorruptError where promoted.json can't be read."""
    return entries_of(storage, standing_bytes(storage))


def standing_bytes(storage: Storage) -> bytes | None:
    """The file as it stands, for `Storage.replace`; None where nothing is promoted."""
    try:
        return storage.read(layout.PROMOTED)
    except FileNotFoundError:
        return None


def entries_of(storage: Storage, data: bytes | None) -> list[Entry]:
    """What the file lists. CorruptError where it can't be read."""
    if data is None:
        return []
    try:
        document = json.loads(data)
        entries = [entry | {"sweep": entry.get("sweep")} for entry in document["saes"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptError(f"{layout.PROMOTED} in {storage.uri} can't be read: {error}.") from None
    if document.get("v") != VERSION:
        raise CorruptError(f"{layout.PROMOTED} in {storage.uri} has version {document.get('v')}; this reads {VERSION}.")
    return entries
