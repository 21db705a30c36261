"""Which SAEs of a grid are worth comparing: pairs of one hook that differ in one setting. Loads no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from midiscover.frontier import is_control, place
from midiscover.saeconfig import SAE_KINDS
from midiscover.summary import Row, strength

BASELINES = ("untrained", "frozen_decoder")
"""Controls that a trained SAE is compared with: how much would match without learning any direction."""
AXES = ("seed", "sparsity", "control", "kind", "width")
"""In which settings a pair may differ, the most telling first."""
MOST_PAIRS = 100
"""SAEs compared with one another in a sweep at most. A pair is 2 n_a n_b d FLOPs: 24 GFLOP at the demo's width, 2.1
TFLOP at 20,480 features of d 2,560, where two CPU cores take half a minute and a GPU a fraction of a second."""


class Pair(NamedTuple):
    """Two SAEs of one hook that differ in one setting."""

    axis: str
    """One of AXES."""
    a: Row
    b: Row


def neighbours(rows: Sequence[Row]) -> list[Pair]:
    """Pairs of SAEs of one hook that differ in exactly one setting, in the order of AXES.

    - `seed`: every two seeds of the same settings.
    - `sparsity`: an l1, k or target and the next higher one of the same architecture, width and seed.
    - `width`: a width and the next larger one.
    - `kind`: every two architectures with the same sparsity setting; l1 of one and k of another are not the same.
    - `control`: a trained SAE and one that learned no directions, untrained or with a frozen decoder.

    Both of a pair have the same `variant`; of two architectures, one's may also name settings that the other doesn't
    have. A control is held against the trained SAEs of its variant or, where there are none, against those of every
    variant. Otherwise controls are not compared. SAEs that differ in what a row does not hold count once, the first
    of them.
    """
    unique: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        unique.setdefault(tuple(_settings(row).values()), row)
    learned = [row for row in unique.values() if not is_control(row)]
    baselines = [row for row in unique.values() if row.get("control") in BASELINES]
    return [
        *_along("seed", learned, every=True),
        *_along("sparsity", learned, every=False),
        *_of_controls([*learned, *baselines]),
        *(pair for pair in _along("kind", learned, every=True, across=True) if _same_but_own(pair)),
        *_along("width", learned, every=False),
    ]


def chosen(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most `most` pairs of a huge sweep: those of seeds first, then the other axes in turns.

    Of more than there is room for, evenly spaced ones are kept, so that no hook and no setting is left out alone.
    """
    by_axis = {axis: [pair for pair in pairs if pair.axis == axis] for axis in AXES}
    shares = dict.fromkeys(AXES, 0) | {"seed": min(most, len(by_axis["seed"]))}
    turns = itertools.cycle(axis for axis in AXES if axis != "seed")
    for _ in range(min(most, len(pairs)) - shares["seed"]):
        shares[next(axis for axis in turns if shares[axis] < len(by_axis[axis]))] += 1
    return [pair for axis in AXES for pair in _spread(by_axis[axis], shares[axis])]


def _spread(pairs: Sequence[Pair], most: int) -> list[Pair]:
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[int((i + 0.5) * len(pairs) / most)] for i in range(most)]


def _settings(row: Row) -> dict[str, Any]:
    """By axis, with what is no axis under names of its own."""
    name, value = strength(row)
    return {
        "place": place(row),
        "seed": row.get("seed"),
        "sparsity by": name,
        "sparsity": value,
        # A trained SAE comes before its controls.
        "control": row["control"] if is_control(row) else "",
        "kind": row["kind"],
        "width": row["d_sae"],
        "variant": row.get("variant"),
    }


def _of_controls(rows: Sequence[Row]) -> Iterator[Pair]:
    """Each control with the trained SAEs of its variant or, where there are none, with those of every variant."""
    by_control: dict[str, list[Pair]] = {}
    for pair in _along("control", rows, every=True, across=True):
        if is_control(pair.b) and not is_control(pair.a):
            by_control.setdefault(pair.b["sae_id"], []).append(pair)
    for pairs in by_control.values():
        yield from [pair for pair in pairs if _agree(pair.a, pair.b)] or pairs


def _agree(a: Row, b: Row) -> bool:
    """Whether all settings that the variant of one names are those of the other's."""
    first, second = _named(a), _named(b)
    return first <= second or second <= first


def _same_but_own(pair: Pair) -> bool:
    """Whether two architectures agree, and what only one's variant names is a setting that only this one has.

    A variant names what differs within its architecture: a learning rate that it leaves out may still be another.
    """
    own = SAE_KINDS[pair.a["kind"]].__dataclass_fields__.keys() ^ SAE_KINDS[pair.b["kind"]].__dataclass_fields__.keys()
    return _agree(pair.a, pair.b) and {text.partition(" ")[0] for text in _named(pair.a) ^ _named(pair.b)} <= own


def _named(row: Row) -> set[str]:
    """The settings of a variant, each with its value: `lr 0.001`."""
    return set(filter(None, (row.get("variant") or "").split(", ")))


def _along(axis: str, rows: Sequence[Row], *, every: bool, across: bool = False) -> Iterator[Pair]:
    """Pairs of rows that are equal but for one axis: all of them, or only neighbours in its order.

    across: whatever their variants.
    """
    groups: dict[tuple[Any, ...], list[tuple[Any, Row]]] = {}
    for row in rows:
        settings = _settings(row)
        value = settings.pop(axis)
        if across:
            del settings["variant"]
        groups.setdefault(tuple(settings.values()), []).append((value, row))
    for members in groups.values():
        ordered = [row for _, row in sorted(members, key=lambda member: member[0])]
        pairs = itertools.combinations(ordered, 2) if every else itertools.pairwise(ordered)
        yield from (Pair(axis, a, b) for a, b in pairs)
