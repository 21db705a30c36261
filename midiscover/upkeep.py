"""What a store holds, how much of it, and what of it nobody needs any more. Loads no torch.

Garbage is what no later run reads: blocks that no marker names, checkpoints of packs whose SAEs stand, parts of
features that are written down, corpora, models and exports that were never finished. It has to be some hours old, so
that what a running job has just written is left alone.

Activations are no garbage: features, verification and another SAE of the same hook read them. They go where
`resources.keep_activations` of every sweep that uses them lets them go, or where that is asked for; what is needed of
them later is then harvested again, from the record of the SAE.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from midiscover.config import KEEP, days_of
from midiscover.store import layout
from midiscover.store.storage import Entry, Storage

GRACE_SECONDS = 24 * 3600.0
"""How old garbage is at least."""
KINDS = {
    layout.MODELS: "model",
    layout.TEXTS: "text",
    layout.CORPORA: "corpus",
    layout.SAES: "sae",
    layout.SWEEPS: "sweep",
}
LAST_WRITTEN = {layout.CORPORA: "manifest.json", layout.MODELS: "manifest.json", layout.TEXTS: "_contents.json"}
"""Folders that are unfinished without this file."""
_BLOCK = re.compile(r"(?P<marker>.+/block-\d+)-[0-9a-f]+\.safetensors")

Json = Mapping[str, Any]


class Holding(NamedTuple):
    """One artifact, or one part of one."""

    what: str
    """Its folder in the store; of SAEs a part that can be large by itself."""
    kind: str
    """`model`, `text`, `corpus`, `activations`, `sae`, `features`, `exports`, `sweep` or `other`."""
    bytes: int
    objects: int
    modified: float
    """Of its newest object, seconds since 1970."""
    used_by: int
    """Finished SAEs that name it, of activations, corpora and models; else 0."""


class Waste(NamedTuple):
    """Something to be removed."""

    key: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Survey:
    """A store, listed once."""

    storage: Storage
    entries: Mapping[str, Entry]
    records: Mapping[str, Json]
    """Finished SAE -> its record."""
    sweeps: Mapping[str, Json]
    """Sweep -> its sweep.json."""


def survey(storage: Storage) -> Survey:
    """List a store and read its small documents. One that can't be read is left out: its owner keeps what it has."""
    entries = {entry.key: entry for entry in storage.entries("")}
    records = {key.split("/")[1]: found for key, found in _documents(storage, entries, layout.SAES, "record.json")}
    sweeps = {key.split("/")[1]: found for key, found in _documents(storage, entries, layout.SWEEPS, "sweep.json")}
    return Survey(storage, entries, records, sweeps)


def holdings(found: Survey) -> list[Holding]:
    """What is there, largest first."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in found.entries.values():
        groups.setdefault(_place(entry.key), []).append(entry)
    uses = _uses(found)
    rows = [
        Holding(
            what=what,
            kind=kind,
            bytes=sum(entry.bytes for entry in entries),
            objects=len(entries),
            modified=max(entry.modified for entry in entries),
            used_by=uses.get("/".join(what.split("/")[:2]), 0),
        )
        for (kind, what), entries in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row.bytes, row.what))


def garbage(found: Survey, *, grace: float = GRACE_SECONDS, now: float | None = None) -> list[Waste]:
    """What no later run reads and is older than `grace` seconds, in the order of keys."""
    before = (time.time() if now is None else now) - grace
    reasons = dict(_reasons(found))
    # What is still being made has old files beside young ones.
    touched: dict[str, float] = {}
    for key, entry in found.entries.items():
        unit = _unit(key)
        touched[unit] = max(touched.get(unit, 0.0), entry.modified)
    return [
        Waste(key, found.entries[key].bytes, reasons[key]) for key in sorted(reasons) if touched[_unit(key)] <= before
    ]


def _unit(key: str) -> str:
    """What is as old as its newest file: a whole folder where all of it belongs to one work, else a file by itself."""
    parts = key.split("/")
    return "/".join(parts[:2]) if parts[0] in LAST_WRITTEN else key


def spent_activations(found: Survey, *, asked: bool = False, now: float | None = None) -> list[Waste]:
    """Activations that their sweeps let go; asked: those of all sweeps that are finished, whatever they say.

    An unfinished sweep keeps them, and so does a harvest that no sweep names.
    """
    now = time.time() if now is None else now
    waste = []
    for harvest, entries in _harvests(found).items():
        users = [sweep for sweep in found.sweeps.values() if harvest in _harvests_of(found, sweep)]
        age = now - max(entry.modified for entry in entries)
        if users and all(_is_done(found, sweep) and (asked or _lets_go(sweep, age)) for sweep in users):
            why = "every sweep that reads them is finished" + ("" if asked else " and lets them go")
            waste += [Waste(entry.key, entry.bytes, why) for entry in entries]
    return sorted(waste)


def remove(storage: Storage, waste: Iterable[Waste]) -> int:
    """Delete; returns the bytes. Manifests and markers go first, so that nothing half-gone is believed in.

    The tokens of a harvest go after its hooks, which are worth nothing without them.
    """

    def turn(one: Waste) -> tuple[bool, bool, bool]:
        kind, place = _place(one.key)
        tokens = kind == "activations" and place.endswith(f"/{layout.TOKENS}")
        return tokens, not one.key.endswith("manifest.json"), not one.key.endswith(".json")

    ordered = sorted(waste, key=turn)
    for one in ordered:
        storage.delete(one.key)
    return sum(one.bytes for one in ordered)


def _documents(
    storage: Storage, entries: Mapping[str, Entry], folder: str, name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in entries:
        if key.startswith(f"{folder}/") and key.count("/") == 2 and key.endswith(f"/{name}"):
            try:
                document = json.loads(storage.read(key))
            except (ValueError, FileNotFoundError):
                continue
            if isinstance(document, dict):
                yield key, document


def _place(key: str) -> tuple[str, str]:
    """Kind and folder of a key."""
    parts = key.split("/")
    match parts:
        case [layout.ACTIVATIONS, _, _, _, *_]:
            return "activations", "/".join(parts[:3])
        case [layout.SAES, _, ("features" | "exports") as part, _, *_]:
            return part, "/".join(parts[:3])
        case [top, _, _, *_] if top in KINDS:
            return KINDS[top], "/".join(parts[:2])
    return "other", parts[0]


def _uses(found: Survey) -> dict[str, int]:
    """Folder -> finished SAEs whose records name it."""
    uses: dict[str, int] = {}
    for record in found.records.values():
        lineage = record.get("lineage") or {}
        named = [f"{layout.ACTIVATIONS}/{lineage.get('harvest')}"]
        named.append(f"{layout.CORPORA}/{(lineage.get('corpus') or {}).get('id')}")
        model = ((record.get("config") or {}).get("model") or {}).get("id") or ""
        if model.startswith("store:"):
            named.append(f"{layout.MODELS}/{model.removeprefix('store:')}")
        for folder in named:
            uses[folder] = uses.get(folder, 0) + 1
    return uses


def _reasons(found: Survey) -> Iterator[tuple[str, str]]:
    yield from _unnamed_blocks(found)
    yield from _finished_packs(found)
    for key in found.entries:
        parts = key.split("/")
        if parts[0] in LAST_WRITTEN and len(parts) > 2:
            if f"{parts[0]}/{parts[1]}/{LAST_WRITTEN[parts[0]]}" not in found.entries:
                yield key, "it was never finished"
        elif key.startswith(f"{layout.SAES}/") and "/parts/" in key:
            if key.partition("/parts/")[0] + "/manifest.json" in found.entries:
                yield key, "the features it was for are written down"
        elif key.startswith(f"{layout.SAES}/") and len(parts) > 4 and parts[2] == "exports":
            folder = "/".join(parts[:4])
            if f"{folder}/unfinished.json" in found.entries and f"{folder}/manifest.json" not in found.entries:
                yield key, "the export was never finished"


def _unnamed_blocks(found: Survey) -> Iterator[tuple[str, str]]:
    for key in found.entries:
        match = _BLOCK.fullmatch(key) if key.startswith(f"{layout.ACTIVATIONS}/") else None
        if match is None:
            continue
        marker = match["marker"] + ".json"
        if marker not in found.entries:
            # A hook with a manifest has a marker for each of its blocks; without one the block may be in the making.
            if key.rpartition("/")[0] + "/manifest.json" in found.entries:
                yield key, "no marker names it"
            continue
        try:
            named = json.loads(found.storage.read(marker))["file"]
        except (ValueError, LookupError, TypeError, FileNotFoundError):
            continue
        if named != key.rpartition("/")[2]:
            yield key, "its marker names another writer's block"


def _finished_packs(found: Survey) -> Iterator[tuple[str, str]]:
    for sweep_id, sweep in found.sweeps.items():
        if _is_done(found, sweep):
            for key in found.entries:
                if key.startswith(f"{layout.SWEEPS}/{sweep_id}/packs/"):
                    yield key, "every SAE of its sweep stands"


def _is_done(found: Survey, sweep: Json) -> bool:
    retired = {
        key.rpartition("/")[2].removesuffix(".json")
        for key in found.entries
        if key.startswith(f"{layout.SWEEPS}/{sweep.get('id')}/retired/")
    }
    return all(name in found.records or name in retired for name in sweep.get("sae_ids", ()))


def _harvests(found: Survey) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for key, entry in found.entries.items():
        if key.startswith(f"{layout.ACTIVATIONS}/"):
            groups.setdefault(key.split("/")[1], []).append(entry)
    return groups


def _harvests_of(found: Survey, sweep: Json) -> set[str]:
    """Of a sweep: that of its model, and that of the model with shuffled weights where an SAE reads it.

    An older sweep.json names the first alone; the other is then known from the SAEs that are done.
    """
    named = {sweep.get("harvest"), *(sweep.get("harvests") or ())}
    for name in sweep.get("sae_ids", ()):
        named.add(((found.records.get(name) or {}).get("lineage") or {}).get("harvest"))
    return {harvest for harvest in named if harvest}


def _lets_go(sweep: Json, age: float) -> bool:
    keep = ((sweep.get("config") or {}).get("resources") or {}).get("keep_activations", KEEP)
    days = days_of(keep)
    return days is not None and age >= days * 86400
