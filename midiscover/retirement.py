"""Early retirement: which SAEs of a pack are beaten at L0 and FVU alike, and need not train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from midiscover.member import Slot

MARGIN = 0.05
"""An SAE counts as beaten where another has both L0 and FVU lower by this share of its own, in the newest points."""
POINTS = 3
"""Points of the loss curve that must agree: one batch's L0 and FVU scatter."""


def dominated(slots: Sequence[Slot], step: int, steps: int) -> Iterator[tuple[Slot, Slot]]:
    """(beaten, better) pairs at this step. None before `train.retire_after`, and none between two points.

    Never a control, and never by one: controls are there to be beaten. Never by another architecture either: who trains
    several wants to see them beside each other. Every SAE that beats others stays, so the frontier of each architecture
    keeps all its points.
    """
    learning = [slot for slot in slots if slot.learns and slot.member.config.control == "none"]
    for slot in learning:
        after = slot.member.train.retire_after
        if (
            after is None
            or not after * steps <= step < steps - 1
            or not slot.history["step"]
            or slot.history["step"][-1] != step
        ):
            continue
        better = next((other for other in learning if other is not slot and _beats(other, slot)), None)
        if better is not None:
            yield slot, better


def _beats(other: Slot, slot: Slot) -> bool:
    if other.retired is not None or other.member.config.kind != slot.member.config.kind:
        return False
    mine, theirs = slot.history, other.history
    if mine["step"][-POINTS:] != theirs["step"][-POINTS:] or len(mine["step"]) < POINTS:
        return False
    return all(
        theirs[name][-i] <= (1 - MARGIN) * mine[name][-i] for name in ("l0", "fvu") for i in range(1, POINTS + 1)
    )
