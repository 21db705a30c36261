"""What language models said of features, and how well that tells where they fire, as it stands beside the records.

    saes/<id>/features/<features id>/explanations/<llm>-<hash>/00000.json    of `BLOCK` features; one folder for each
                                                                             model that was asked, and how

Several may write at once: what each adds is kept. Loads no torch.
"""

from __future__ import annotations

import json
import logging
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
BLOCK = 1024
"""Features of a document, which is written anew each time that one of them is added."""
SCORED = ("detection", "fuzz")
log = logging.getLogger("midiscover.features")

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
        """settings: what was asked and how; another gets documents of its own."""
        self.storage, self._of = storage, (sae_id, features_id)
        self._head = {"v": VERSION, "sae": sae_id, "features_id": features_id, "llm": llm, "settings": dict(settings)}
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", llm).strip("-")[:60]
        self._name = f"{name or 'llm'}-{fingerprint('explain', VERSION, {'llm': llm, **settings})}"

    def key(self, feature: int) -> str:
        """Of the document in which a feature stands."""
        return layout.explanations(*self._of, self._name, feature // BLOCK)

    def read(self) -> dict[int, Entry]:
        """Feature -> its entry. CorruptError for a document that is none."""
        found: dict[int, Entry] = {}
        for key in self.storage.list(self.key(0).rpartition("/")[0]):
            found |= _read(self.storage, key)
        return found

    def add(self, entries: Mapping[int, Entry]) -> None:
        """Put these in; those of other features stay as they stand. CorruptError for a document that is none."""
        blocks: dict[str, dict[int, Entry]] = {}
        for feature, entry in entries.items():
            blocks.setdefault(self.key(feature), {})[feature] = entry
        for key, block in blocks.items():
            while not self._replaced(key, block):
                pass

    def _replaced(self, key: str, entries: Mapping[int, Entry]) -> bool:
        """Whether nobody else wrote meanwhile."""
        old = _bytes(self.storage, key)
        merged = ({} if old is None else _entries(_parsed(old, key))) | dict(entries)
        features = {str(feature): merged[feature] for feature in sorted(merged)}
        new = dump(self._head | {"changed": lineage.now(), "features": features})
        return self.storage.replace(key, old, new)


def newest(storage: Storage, keys: Iterable[str]) -> dict[int, Explanation]:
    """Feature -> the newest of what these documents say of it; one that is none is left out, which the log tells."""
    found: dict[int, Explanation] = {}
    for key in sorted(keys):
        data = _bytes(storage, key)
        try:
            document: dict[str, Any] = {"features": {}} if data is None else _parsed(data, key)
        except CorruptError as error:
            log.warning("%s", error)
            continue
        for feature, entry in _entries(document).items():
            scores = [(entry.get(name) or {}).get("score") for name in SCORED]
            mine = Explanation(entry["text"], document["llm"], entry["made"], *scores)
            if feature not in found or found[feature].made <= mine.made:
                found[feature] = mine
    return found


def _bytes(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key)
    except FileNotFoundError:
        return None


def _read(storage: Storage, key: str) -> dict[int, Entry]:
    data = _bytes(storage, key)
    return {} if data is None else _entries(_parsed(data, key))


def _parsed(data: bytes, key: str) -> dict[str, Any]:
    """A document whose entries are what `Entry` says. CorruptError else."""
    try:
        document = json.loads(data)
        if document["v"] != VERSION:
            raise TypeError(f"version {document['v']}, not {VERSION}")
        good = isinstance(document["llm"], str) and all(map(_is_entry, _entries(document).values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptError(f"{key} is not readable as explanations ({error}); remove it and explain again.") from None
    if not good:
        raise CorruptError(f"{key} holds entries that are no explanations; remove it and explain again.")
    return document


def _entries(document: Mapping[str, Any]) -> dict[int, Entry]:
    return {int(feature): entry for feature, entry in document["features"].items()}


def _is_entry(entry: Mapping[str, Any]) -> bool:
    scores = [entry[name]["score"] for name in SCORED if entry.get(name) is not None]
    texts = isinstance(entry["text"], str) and isinstance(entry["made"], str)
    return texts and all(score is None or isinstance(score, (int, float)) for score in scores)
