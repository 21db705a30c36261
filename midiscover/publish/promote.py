"""Which SAEs of a store a deployment serves: promoted.json, changed by comparison with what stood there.

    {"v": 1, "saes": [{"id", "hook", "output_hook", "sweep", "promoted", "by", "metrics"}], "updated"}

Two people who promote at once both succeed: whoever comes second reads again and adds to what the first wrote.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from midiscover import lineage
from midiscover.errors import CorruptError, NotFoundError, StoreError
from midiscover.frontier import is_control
from midiscover.promoted import VERSION, Entry, entries_of, promoted, standing_bytes
from midiscover.publish.verify import CHEAP, subject_of_sae, verify
from midiscover.store import layout
from midiscover.store.documents import dump, read_json
from midiscover.store.storage import Storage
from midiscover.targets import Target

KEPT = ("l0", "fvu", "dead_share", "ce_recovered")
"""Metrics that stand in promoted.json."""
_ATTEMPTS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an SAE must keep to be served, on held-out text."""

    max_fvu: float
    min_l0: float
    max_l0: float
    max_dead: float
    min_ce: float | None = None

    def broken(self, metrics: Mapping[str, Any]) -> list[str]:
        """Which limits these metrics break, and by how much."""
        bounds: list[tuple[str, str, float, float]] = [
            ("FVU", "fvu", -math.inf, self.max_fvu),
            ("L0", "l0", self.min_l0, self.max_l0),
            ("dead share", "dead_share", -math.inf, self.max_dead),
        ]
        if self.min_ce is not None:
            bounds.append(("CE recovered", "ce_recovered", self.min_ce, math.inf))
        told = []
        for title, key, low, high in bounds:
            value = metrics.get(key)
            if value is None:
                told.append(f"{title} was not measured")
            elif not value <= high:
                told.append(f"{title} {value:.4g} is above {high:g} by {value - high:.3g}")
            elif not value >= low:
                told.append(f"{title} {value:.4g} is below {low:g} by {low - value:.3g}")
        return told


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What came of it."""

    promoted: tuple[Entry, ...]
    refused: dict[str, str]
    """SAE id -> why not; those that fit and have a better one of their hook as well. Says so where one was promoted
    before and stays."""


def promote(storage: Storage, target: Target, limits: Limits) -> Decision:
    """Promote, of each hook, the SAE of `target` with the lowest FVU among those that keep the limits and verify.

    An earlier choice of the same sweep for that hook is replaced; those of other sweeps, and of a hook for which there
    is no new one, stay until they are withdrawn.
    """
    refused: dict[str, str] = {}
    fits: dict[tuple[str, str], list[tuple[float, str, Entry]]] = {}
    for sae_id in target.saes:
        record = read_json(storage, layout.record(sae_id))
        if record is None:
            raise CorruptError(f"{sae_id} in {storage.uri} has lost its record.")
        metrics = _metrics(storage, target, record)
        problems = ["it is a control"] if is_control(record["sae"]) else limits.broken(metrics)
        if problems:
            refused[sae_id] = "; ".join(problems)
            continue
        entry = {
            "id": sae_id,
            "hook": record["hook"],
            "output_hook": record.get("output_hook") or record["hook"],
            "sweep": target.sweep_id,
            "promoted": lineage.now(),
            "by": lineage.owner(),
            "metrics": {name: metrics.get(name) for name in KEPT},
        }
        fits.setdefault(_place(entry), []).append((metrics["fvu"], sae_id, entry))
    chosen = []
    for candidates in fits.values():
        best = min(candidates, key=lambda candidate: candidate[:2])
        report = verify(subject_of_sae(storage, best[1]), CHEAP)
        wrong = [f"{outcome.name}: {outcome.detail}" for outcome in report.outcomes if outcome.status == "fail"]
        if wrong:
            # Not the next best one instead: a damaged SAE is to be mended, and nobody would look.
            refused[best[1]] = "it does not verify: " + "; ".join(wrong)
        else:
            chosen.append(best[2])
        refused |= {name: f"{best[1]} has a lower FVU" for _, name, _ in candidates if name != best[1]}
    if chosen:
        _change(storage, lambda entries: _with([_whole(storage, entry) for entry in entries], chosen))
    for sae_id in refused.keys() & {entry["id"] for entry in promoted(storage)}:
        refused[sae_id] += "; it stays promoted from before, until --withdraw takes it out"
    return Decision(promoted=tuple(chosen), refused=refused)


def withdraw(storage: Storage, name: str) -> list[str]:
    """Take out the SAE or all of the sweep that `name` begins; the ids. NotFoundError where none or several fit."""
    gone: list[str] = []

    def without(entries: list[Entry]) -> list[Entry]:
        named = {entry[key] for entry in entries for key in ("id", "sweep") if entry[key]}
        fits = {name} if name in named else {found for found in named if found.startswith(name)}
        if not entries:
            raise NotFoundError(f"Nothing is promoted in {storage.uri}, so nothing can be withdrawn.")
        if len(fits) != 1:
            known = ", ".join(sorted(entry["id"] for entry in entries))
            what = f"'{name}' fits {len(fits)}" if fits else f"Nothing that '{name}' names"
            raise NotFoundError(f"{what} of the promoted SAEs of {storage.uri}; they are {known}.")
        gone[:] = [entry["id"] for entry in entries if fits & {entry["id"], entry["sweep"]}]
        return [entry for entry in entries if entry["id"] not in gone]

    _change(storage, without)
    return gone


def _with(entries: list[Entry], chosen: list[Entry]) -> list[Entry]:
    ids = {entry["id"] for entry in chosen}
    places = {(entry["sweep"], *_place(entry)) for entry in chosen if entry["sweep"]}
    kept = [entry for entry in entries if entry["id"] not in ids and (entry["sweep"], *_place(entry)) not in places]
    return [*kept, *chosen]


def _place(entry: Entry) -> tuple[str, str]:
    """The hooks that are read and written, of which one SAE of a sweep is served."""
    return entry["hook"], entry["output_hook"]


def _whole(storage: Storage, entry: Entry) -> Entry:
    """With `output_hook`, which entries once lacked, and with `hook` where somebody wrote the entry by hand."""
    if entry.get("hook") and entry.get("output_hook"):
        return entry
    try:
        record = read_json(storage, layout.record(entry["id"])) or {}
    except CorruptError:  # whoever promotes another one can't help it
        record = {}
    hook = entry.get("hook") or record.get("hook")
    output_hook = entry.get("output_hook") or record.get("output_hook") or hook
    return entry | {"hook": hook, "output_hook": output_hook}


def _metrics(storage: Storage, target: Target, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """As the sweep measured it, where one was named; else as it was measured first."""
    evaluation_id = (target.record or {}).get("evaluation_id")
    if evaluation_id in (None, record["evaluation_id"]):
        return record["metrics"]
    evaluation = read_json(storage, layout.evaluation(record["id"], evaluation_id))
    return evaluation["metrics"] if evaluation else {}


def _change(storage: Storage, change: Callable[[list[Entry]], list[Entry]]) -> None:
    """Replace promoted.json by what `change` makes of it, again and again until nobody came in between."""
    for attempt in range(_ATTEMPTS):
        standing = standing_bytes(storage)
        entries = sorted(change(entries_of(storage, standing)), key=lambda entry: entry["id"])
        document = {"v": VERSION, "saes": entries, "updated": lineage.now()}
        if storage.replace(layout.PROMOTED, standing, dump(document)):
            return
        time.sleep(random.uniform(0, min(1.0, 0.01 * 2**attempt)))
    raise StoreError(f"{layout.PROMOTED} in {storage.uri} could not be changed: other writers kept getting in the way.")
