"""What a store holds, how much of it, and what of it nobody needs any more. Loads no torch.

Garbage is what no later run reads: blocks that no marker names, checkpoints of packs whose SAEs stand, parts of
features that are written down, corpora, models and exports that were never finished. Whatever goes has to be some hours
old, so that what a running job has just written is left alone. A store may lie in a folder or bucket with people's own
`models` and `texts`: what we began is known by its name or by `layout.STARTED`.

Activations are no garbage: features, verification and another SAE of the same hook read them. They go where
`resources.keep_activations` of every sweep that uses them lets them go, or where that is asked for; what is needed of
them later is then harvested again, from the record of the SAE. A sweep that is unfinished names what it uses in its
sweep.json; another job writes `layout.harvest_reader` while it reads.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from midiscover.config import KEEP, days_of
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Entry, Storage

GRACE_SECONDS = 24 * 3600.0
"""How old is at least what goes."""
KINDS = {
    layout.MODELS: "model",
    layout.TEXTS: "text",
    layout.CORPORA: "corpus",
    layout.SAES: "sae",
    layout.SWEEPS: "sweep",
}
READERS = 16
"""Small documents of a bucket that are read at once."""
LAST_WRITTEN = {layout.CORPORA: "manifest.json", layout.MODELS: "manifest.json", layout.TEXTS: "_contents.json"}
"""Folders that are unfinished without this file."""
_NAMES = {layout.CORPORA: re.compile(r"c\.[0-9a-f]{10}"), layout.TEXTS: re.compile(r"[0-9a-f]{16}")}
"""What we call folders whose names nobody chooses."""
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
    sweep_files: Mapping[str, Sequence[str]]
    """Sweep -> all keys in its folder."""
    unreadable: Sequence[str]
    """Keys of what should be a sweep.json: nobody knows which activations it uses, so all stay."""
    leftovers: Sequence[Entry]
    """What killed writers left half-written in a folder."""


def survey(storage: Storage) -> Survey:
    """List a store and read its small documents. One that can't be read is left out: its owner keeps what it has."""
    entries = {entry.key: entry for entry in storage.entries("")}
    records, _ = _documents(storage, entries, layout.SAES, "record.json")
    sweeps, unreadable = _documents(storage, entries, layout.SWEEPS, "sweep.json")
    sweep_files: dict[str, list[str]] = {}
    for key in entries:
        if key.startswith(f"{layout.SWEEPS}/"):
            sweep_files.setdefault(key.split("/")[1], []).append(key)
    leftovers = storage.leftovers() if isinstance(storage, LocalStorage) else ()
    return Survey(storage, entries, records, sweeps, sweep_files, unreadable, leftovers)


def holdings(found: Survey) -> list[Holding]:
    """What is there, largest first."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in (*found.entries.values(), *found.leftovers):
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
    match key.split("/"):
        case [kind, name, _, *_] if kind in LAST_WRITTEN:
            return f"{kind}/{name}"
        case [layout.SAES, _, "exports", _, _, *_] as parts:
            return "/".join(parts[:4])
    return key


def spent_activations(
    found: Survey, *, asked: bool = False, grace: float = GRACE_SECONDS, now: float | None = None
) -> list[Waste]:
    """Activations that their sweeps let go; asked: those of all sweeps that are finished, whatever they say.

    An unfinished sweep keeps them, and so do a harvest that no sweep names, one that is younger than `grace` seconds
    and one that a job has said to read, for a day.
    """
    now = time.time() if now is None else now
    if found.unreadable:
        return []
    users: dict[str, list[str]] = {}
    for sweep_id, sweep in found.sweeps.items():
        for harvest in _harvests_of(found, sweep):
            users.setdefault(harvest, []).append(sweep_id)
    waste = []
    for harvest, entries in _harvests(found).items():
        sweeps = users.get(harvest, ())
        age = now - max(entry.modified for entry in entries)
        words = [entry for entry in entries if entry.key.startswith(f"{layout.harvest_readers(harvest)}/")]
        is_read = any(now - entry.modified < GRACE_SECONDS for entry in words)
        done = sweeps and not is_read and age >= grace and all(_is_done(found, sweep) for sweep in sweeps)
        if done and (asked or all(_lets_go(found.sweeps[sweep], age) for sweep in sweeps)):
            why = "every sweep that reads them is finished" + ("" if asked else " and lets them go")
            waste += [Waste(entry.key, entry.bytes, why) for entry in entries]
    return sorted(waste)


def spent_by(found: Survey, sweep_id: str) -> list[Waste]:
    """Of `spent_activations`, those that a sweep which has just ended used itself, however young.

    What was written after its SAEs were measured and recorded is another job's.
    """
    sweep = found.sweeps.get(sweep_id, {})
    ours, saes = _harvests_of(found, sweep), set(sweep.get("sae_ids", ()))
    ended = 0.0
    for key, entry in found.entries.items():
        match key.split("/"):
            case [layout.SAES, name, "record.json" | "evaluations", *_] if name in saes:
                ended = max(ended, entry.modified)
    for harvest, entries in _harvests(found).items():
        if max(entry.modified for entry in entries) > ended:
            ours.discard(harvest)
    return [one for one in spent_activations(found, grace=0) if one.key.split("/")[1] in ours]


def remove(found: Survey, waste: Iterable[Waste]) -> int:
    """Delete what is still as it was listed; returns the bytes.

    Manifests and markers go first, so that nothing half-gone is believed in; the word that it is unfinished goes last.
    The tokens of a harvest go after its hooks, which are worth nothing without them. Blocks are named by their content,
    so a job that misses them writes them under the same names: what was written since stays, and so does all of a
    harvest that somebody has begun to use since, and of what somebody goes on with.
    """

    def turn(one: Waste) -> tuple[bool, bool, bool, bool, str]:
        kind, place = _place(one.key)
        tokens = kind == "activations" and place.endswith(f"/{layout.TOKENS}")
        folder = one.key.rpartition("/")[0]
        is_word = one.key.endswith(f"/{layout.STARTED}")
        return tokens, is_word, not one.key.endswith("manifest.json"), not one.key.endswith(".json"), folder

    size = 0
    for (*_, folder), group in groupby(sorted(waste, key=turn), turn):
        ours = list(group)
        if _is_taken_up(found, ours[0].key):
            continue
        standing = set(found.storage.entries(folder))
        for one in ours:
            if found.entries[one.key] in standing:
                found.storage.delete(one.key)
                size += one.bytes
    return size


def _is_taken_up(found: Survey, key: str) -> bool:
    """Whether, since the store was listed, somebody goes on with the unit of `key`, or has begun to use its harvest."""

    def since(folder: str) -> dict[str, Entry]:
        return {one.key: one for one in found.storage.entries(folder) if found.entries.get(one.key) != one}

    unit = _unit(key)
    if unit != key:
        return bool(since(unit))
    if not key.startswith(f"{layout.ACTIVATIONS}/"):
        return False
    harvest, storage = key.split("/")[1], found.storage
    readers = layout.harvest_readers(harvest)
    fresh = since(layout.SWEEPS) | since(readers)
    sweeps, unreadable = _documents(storage, fresh, layout.SWEEPS, "sweep.json")
    is_read = any(key.startswith(f"{readers}/") for key in fresh)
    return bool(unreadable) or is_read or any(harvest in _harvests_of(found, one) for one in sweeps.values())


def _documents(
    storage: Storage, entries: Iterable[str], folder: str, name: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Folder -> its document of this name; and the keys of those that are no JSON object."""
    found, unreadable = {}, []
    named = [
        key for key in entries if key.startswith(f"{folder}/") and key.count("/") == 2 and key.endswith(f"/{name}")
    ]
    for key, document in _read(storage, named):
        if isinstance(document, dict):
            found[key.split("/")[1]] = document
        else:
            unreadable.append(key)
    return found, unreadable


def _read(storage: Storage, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys with the JSON that stands there, None where it is none; without those that were deleted since."""

    def read(key: str) -> bytes | None:
        try:
            return storage.read(key)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(1 if storage.is_local else READERS) as readers:
        for key, data in zip(keys, readers.map(read, keys), strict=True):
            if data is None:
                continue
            try:
                yield key, json.loads(data)
            except ValueError:
                yield key, None


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
    yield from _unfinished(found)
    for key in found.entries:
        match key.split("/"):
            case [layout.SAES, sae, "features", name, "parts", _]:
                if layout.features_manifest(sae, name) in found.entries:
                    yield key, "the features it was for are written down"


def _unfinished(found: Survey) -> Iterator[tuple[str, str]]:
    words = [key for key in found.entries if key == f"{_unit(key)}/{layout.STARTED}"]
    read = {_unit(key): word for key, word in _read(found.storage, words)}
    said = {unit: word.get("others") for unit, word in read.items() if isinstance(word, dict)}
    foreign = {unit: set(map(str, others)) for unit, others in said.items() if isinstance(others, list)}
    for key in found.entries:
        unit = _unit(key)
        kind, _, name = unit.partition("/")
        if unit == key or f"{unit}/{LAST_WRITTEN.get(kind, 'manifest.json')}" in found.entries:
            continue
        is_ours = _NAMES[kind].fullmatch(name) if kind in _NAMES else unit in foreign
        if is_ours and key.removeprefix(f"{unit}/") not in foreign.get(unit, ()):
            yield key, "the export was never finished" if kind == layout.SAES else "it was never finished"


def _unnamed_blocks(found: Survey) -> Iterator[tuple[str, str]]:
    marked: dict[str, list[str]] = {}
    for key in found.entries:
        match = _BLOCK.fullmatch(key) if key.startswith(f"{layout.ACTIVATIONS}/") else None
        if match is None:
            continue
        marker = match["marker"] + ".json"
        if marker in found.entries:
            marked.setdefault(marker, []).append(key)
        # A hook with a manifest has a marker for each of its blocks; without one the block may be in the making.
        elif key.rpartition("/")[0] + "/manifest.json" in found.entries:
            yield key, "no marker names it"
    for marker, row in _read(found.storage, list(marked)):
        if isinstance(row, dict) and "file" in row:
            for key in marked[marker]:
                if row["file"] != key.rpartition("/")[2]:
                    yield key, "its marker names another writer's block"


def _finished_packs(found: Survey) -> Iterator[tuple[str, str]]:
    for sweep_id in found.sweeps:
        if _is_done(found, sweep_id):
            for key in found.sweep_files[sweep_id]:
                if key.startswith(f"{layout.SWEEPS}/{sweep_id}/packs/"):
                    yield key, "every SAE of its sweep stands"


def _is_done(found: Survey, sweep_id: str) -> bool:
    """Whether every SAE of a sweep stands and is measured as the sweep asks, or was retired.

    Measuring anew reads the activations of SAEs that have long stood.
    """
    sweep = found.sweeps[sweep_id]
    retired = {
        key.rpartition("/")[2].removesuffix(".json")
        for key in found.sweep_files[sweep_id]
        if key.startswith(f"{layout.SWEEPS}/{sweep_id}/retired/")
    }
    return all(
        (name in found.records and layout.evaluation(name, str(sweep.get("evaluation_id"))) in found.entries)
        or name in retired
        for name in sweep.get("sae_ids", ())
    )


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
