"""Whether a sweep of more packs than slots keeps every slot busy: a trace.

    python -m tests.bench.slots [--steps 150] [--threads 1]

Nine packs of one SAE each, on a harvest of random activations made for it, trained as a sweep trains them: a Tune trial
a pack, as many at once as the cores hold. A slot is busy from a pack's first event to its last. The table counts its
busy time from the first start to the last end, and apart from it without the end, when fewer packs than slots are left.
Judges nothing: the exit code is 0.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from jobs.board import watched
from jobs.packs import run_packs
from jobs.runtime import pack_slots, ray_session
from midiscover import tables
from midiscover.resolve import make_packs
from midiscover.store.local import LocalStorage
from tests.bench.harvest import machine
from tests.bench.sweep_overhead import NotingBoard, add_pack_flags, prepare

COLUMNS = 60


class Stay(NamedTuple):
    """Of a pack in a slot, in seconds."""

    pack: str
    begin: float
    end: float


def stays(notes: NotingBoard) -> list[Stay]:
    """When each pack was at work, by its beginning."""
    begins = {event.key: at for at, event in notes.events if event.kind == "started"}
    ends = {event.key: at for at, event in notes.events if event.kind == "left"}
    first = min(begins.values())
    return sorted(
        (Stay(pack, at - first, ends[pack] - first) for pack, at in begins.items()), key=lambda one: one.begin
    )


def into_slots(found: Sequence[Stay], count: int) -> list[list[Stay]]:
    """Each stay in the slot that has been free for longest."""
    slots: list[list[Stay]] = [[] for _ in range(count)]
    for stay in found:
        min(slots, key=lambda slot: slot[-1].end if slot else -1.0).append(stay)
    return slots


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pack_flags(parser, threads=1)  # the cores hold as many packs at once as this leaves
    args = parser.parse_args(argv)
    print(machine())
    notes = NotingBoard()
    with tempfile.TemporaryDirectory(prefix="midiscover-bench-") as folder:
        job = prepare(LocalStorage(Path(folder)), args)
        packs = tuple(make_packs(job.resolved.saes, 1, {sae.id for sae in job.resolved.saes}))
        with ray_session() as cluster:
            slots = pack_slots(cluster, job.resolved.config.resources, len(packs))
            with watched("sweep", notes.note, stall_seconds=job.resolved.config.resources.stall_seconds) as board:
                run_packs(replace(job, crews=tuple((pack,) for pack in packs), board=board, slots=slots))
    report(stays(notes), slots.count)
    return 0


def report(found: Sequence[Stay], count: int) -> None:
    """The trace, and how much of the time the slots were busy."""
    whole, full = max(stay.end for stay in found), sorted(stay.end for stay in found)[-count]
    table = Table("slot", "packs", f"0 to {whole:.0f} s", "busy", "busy until none waited", box=box.SIMPLE_HEAD)
    for number, slot in enumerate(into_slots(found, count), start=1):
        line = [" "] * COLUMNS
        for place, stay in enumerate(slot):
            begin, end = (min(COLUMNS, round(at / whole * COLUMNS)) for at in (stay.begin, stay.end))
            line[begin:end] = ["█▒"[place % 2]] * (end - begin)
        busy = sum(stay.end - stay.begin for stay in slot) / whole
        early = sum(min(stay.end, full) - min(stay.begin, full) for stay in slot) / full
        table.add_row(str(number), str(len(slot)), "".join(line), f"{busy:.0%}", f"{early:.0%}")
    tables.show(table)


if __name__ == "__main__":
    sys.exit(main())
