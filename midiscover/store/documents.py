"""JSON documents of a store: records, manifests and whatever else says something about something."""

from __future__ import annotations

import json
from typing import Any

from midiscover.errors import CorruptError
from midiscover.store.storage import Storage


def dump(value: Any) -> bytes:
    """JSON as it stands in the store: indented, keys in the order given, no NaN."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_json(storage: Storage, key: str) -> dict[str, Any] | None:
    """A document of the store, or None where there is none. CorruptError where it is no JSON."""
    try:
        return json.loads(storage.read(key))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptError(f"{key} in {storage.uri} is not readable as JSON: {error}.") from None


def folders_with(storage: Storage, parent: str, name: str) -> list[str]:
    """Names of the folders of `parent` in which a document of this name lies, sorted; copies further down are none."""
    keys = storage.list(parent)
    return [key.split("/")[1] for key in keys if key.count("/") == 2 and key.endswith(f"/{name}")]
