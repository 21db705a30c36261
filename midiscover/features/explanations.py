"""What language models said of features, and how well that tells where they fire, as it stands beside the records.

    saes/<id>/features/<features id>/explanations/<llm>-<hash>.json    one for each model that was asked, and how

Several may write at once: what each adds is kept. Loads no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from midiscover import lineage
from midiscover.errors import CorruptError
from midiscover.ids import fingerprint
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.storage import Storage

VERSION = 1

Entry = dict[str, Any]
"""Of one feature: `text`, `made`, and, where it was judged, `detection`, `fuzz` and `baselines`."""


class Explanation(NamedTuple):
    """What stands for a feature: the newest that any model said."""

    text: str
    llm: str
    made: str
    detection: float | None
    """Balanced accuracy of the model that judged; None where it did not."""
    fuzz: float | None


class Explanations:
    """What one model said of the features of one SAE."""

    def __init__(self, storage: Storage, sae_id: str, features_id: str, llm: str, settings: Mapping[str, Any]) -> None:
        """settings: what was asked and how; another gets a document of its own."""
        self.storage = storage
        self._head = {"v": VERSION, "sae": sae_id, "features_id": features_id, "llm": llm, "settings": dict(settings)}
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", llm).strip("-")[:60]
        digest = fingerprint("explain", VERSION, {"llm": llm, **settings})
        self.key = layout.explanations(sae_id, features_id, f"{name}-{digest}")

    def read(self) -> dict[int, Entry]:
        """Feature -> its entry. CorruptError for a document that is none."""
        data = _bytes(self.storage, self.key)
        return {} if data is None else _entries(_parsed(data, self.key))

    def add(self, entries: Mapping[int, Entry]) -> None:
        """Put these in; those of other features stay as they stand."""
        while True:
            old = _bytes(self.storage, self.key)
            known = {} if old is None else _entries(_parsed(old, self.key))
            merged = known | dict(entries)
            features = {str(feature): merged[feature] for feature in sorted(merged)}
            new = dump(self._head | {"changed": lineage.now(), "features": features})
            if self.storage.replace(self.key, old, new):
                return


def newest(storage: Storage, keys: Iterable[str]) -> dict[int, Explanation]:
    """Feature -> the newest of what these documents say of it. CorruptError for one that is none."""
    found: dict[int, Explanation] = {}
    for key in sorted(keys):
        data = _bytes(storage, key)
        if data is None:
            continue
        document = _parsed(data, key)
        for feature, entry in _entries(document).items():
            mine = Explanation(
                str(entry["text"]),
                str(document["llm"]),
                str(entry["made"]),
                _score(entry, "detection"),
                _score(entry, "fuzz"),
            )
            if feature not in found or found[feature].made <= mine.made:
                found[feature] = mine
    return found


def _score(entry: Entry, name: str) -> float | None:
    return (entry.get(name) or {}).get("score")


def _bytes(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key)
    except FileNotFoundError:
        return None


def _parsed(data: bytes, key: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
        if document["v"] != VERSION:
            raise CorruptError(f"{key} has version {document['v']}; this miDiscover reads {VERSION}.")
        if not all(isinstance(entry["text"], str) for entry in document["features"].values()):
            raise TypeError("a feature without a text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{key} is not readable as explanations ({error}); remove it and explain again.") from None
    return document


def _entries(document: Mapping[str, Any]) -> dict[int, Entry]:
    return {int(feature): entry for feature, entry in document["features"].items()}
