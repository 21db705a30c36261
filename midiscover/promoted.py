"""promoted.json: which SAEs of a store a deployment serves. Read here; `publish/promote.py` changes it.

{"v": 1, "saes": [{"id", "hook", "output_hook", "sweep", "promoted", "by", "metrics"}], "updated"}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from midiscover.errors import CorruptError
from midiscover.store import layout
from midiscover.store.storage import Storage

VERSION = 1
Entry = dict[str, Any]
log = logging.getLogger(__name__)


def promoted(storage: Storage, tell: Callable[[str], None] = log.warning) -> list[Entry]:
    """What is promoted in a store. CorruptError where promoted.json can't be read.

    tell: takes a sentence about each entry that is left out, as it names no SAE.
    """
    return entries_of(storage, standing_bytes(storage), tell)


def standing_bytes(storage: Storage) -> bytes | None:
    """The file as it stands, for `Storage.replace`; None where nothing is promoted."""
    try:
        return storage.read(layout.PROMOTED)
    except FileNotFoundError:
        return None


def entries_of(storage: Storage, data: bytes | None, tell: Callable[[str], None] = log.warning) -> list[Entry]:
    """What the file lists; tell as of `promoted`. CorruptError where it can't be read."""
    if data is None:
        return []
    where = f"{layout.PROMOTED} in {storage.uri}"
    try:
        document = json.loads(data)
        found = list(document["saes"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CorruptError(f"{where} can't be read: {error}.") from None
    if document.get("v") != VERSION:
        raise CorruptError(f"{where} has version {document.get('v')}; this reads {VERSION}.")
    entries: list[Entry] = []
    for number, entry in enumerate(found, 1):
        if isinstance(entry, dict) and _is_sae(entry.get("id")):
            entries.append(entry | {"sweep": entry.get("sweep")})
        else:
            tell(f"Entry {number} of {where} has no id of an SAE and is left out.")
    return entries


def _is_sae(name: Any) -> bool:
    return isinstance(name, str) and "/" not in name and layout.is_key(name)
