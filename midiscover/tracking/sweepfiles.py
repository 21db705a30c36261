"""What a sweep keeps beside its sweep.json for people to look up: pairs of SAEs compared, SAEs that were dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from midiscover.errors import CorruptError
from midiscover.store import layout

if TYPE_CHECKING:
    from midiscover.store.storage import Storage

VERSION = 1
STABILITY = "stability.json"


def stability_document(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """What stands in stability.json; `pairs` as `results.sae_stability` returns them."""
    return {"v": VERSION, "pairs": pairs}


def read_stability(storage: Storage, sweep_id: str) -> list[dict[str, Any]]:
    """The pairs of a sweep's stability.json; none where there is no such file. CorruptError where it can't be read."""
    key = layout.sweep_file(sweep_id, STABILITY)
    try:
        document = json.loads(storage.read(key))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise CorruptError(f"{key} is not JSON; delete it and run the sweep again, which writes it.") from error
    if not isinstance(document, dict) or document.get("v") != VERSION:
        raise CorruptError(f"{key} is not of version {VERSION}, the one that this miDiscover reads; update it.")
    return document["pairs"]


def retired_reason(word: Mapping[str, Any]) -> str:
    """Why a sweep dropped an SAE, from its retired/<id>.json."""
    return f"dropped at step {word['step']}: {word['by']} had a lower L0 and a lower FVU"
