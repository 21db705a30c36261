"""Which SAEs of a sweep are worth publishing, from the store alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from midiscover.errors import CorruptError, NotFoundError
from midiscover.frontier import frontier_of_hooks, place
from midiscover.ids import variants
from midiscover.results import FOREIGN_METRICS, ROW_METRICS
from midiscover.store import layout
from midiscover.store.documents import folders_with, read_json
from midiscover.store.storage import Storage
from midiscover.summary import Row


def sweep_rows(storage: Storage, sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finished SAEs of a sweep.json as plain rows with their metrics, in the order of its grid; `variant` of each
    as `ids.variants` has it, `""` where its record can't be read.
    """
    rows, records = [], []
    for row in sweep["saes"]:
        found = read_json(storage, layout.evaluation(row["sae_id"], sweep["evaluation_id"]))
        try:
            record = read_json(storage, layout.record(row["sae_id"]))
        except CorruptError:  # told where this SAE is what is asked for
            record = {}
        if found is not None and record is not None:
            rows.append(row | {name: found["metrics"].get(name) for name in (*ROW_METRICS, *FOREIGN_METRICS)})
            records.append(record)
    return [row | {"variant": variant} for row, variant in zip(rows, variants(records), strict=True)]


def sweep_of(storage: Storage, sae_id: str) -> dict[str, Any] | None:
    """The newest sweep.json that names an SAE."""
    found = folders_with(storage, layout.SWEEPS, "sweep.json")
    read = (read_json(storage, layout.sweep_record(name)) for name in found)
    sweeps = [sweep for sweep in read if sweep and sae_id in sweep["sae_ids"]]
    return max(sweeps, key=lambda sweep: (sweep["created"], sweep["id"]), default=None)


def chosen(rows: Sequence[Row], wanted: str) -> list[str]:
    """The ids that `publish.saes` means, in the order of `rows`. NotFoundError where there is none."""
    match wanted:
        case "all":
            found = list(rows)
        case "frontier":
            found = _frontier(rows)
        case "best":
            best: dict[tuple[str, str], Row] = {}
            for row in _frontier(rows):
                if place(row) not in best or row["fvu"] < best[place(row)]["fvu"]:
                    best[place(row)] = row
            found = list(best.values())
        case _:
            found = [row for row in rows if str(row["sae_id"]).startswith(wanted)]
    if not found:
        raise NotFoundError(
            f"publish.saes is '{wanted}', which fits none of the sweep's {len(rows)} finished SAEs; give all, "
            "frontier, best or the beginning of an id."
        )
    return [str(row["sae_id"]) for row in found]


def _frontier(rows: Sequence[Row]) -> list[Row]:
    return [row for row, mark in zip(rows, frontier_of_hooks(rows), strict=True) if mark]
