"""What the terminal tables, the charts and the report have in common: order, names, numbers and pass marks of SAEs.

Works on plain rows (one mapping per SAE, missing values None) and returns plain data. Draws nothing and reads nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midiscover.frontier import is_control, place

Row = Mapping[str, Any]
"""One SAE: `sae_id, hook, layer, kind, control, sparsity_label, d_sae, seed, l0, fvu, ce_recovered, dead_share, ...`,
as `resolve.PlannedSae.row` and `results.ROW_METRICS` have them, and `variant` as `ids.variants` has it."""

METRICS = {
    "L0": "Mean number of features that fire (activation above 0) per held-out token.",
    "FVU": "Fraction of variance unexplained: residual sum of squares over the variance about the global mean; "
    "0 is a perfect reconstruction, 1 is no better than the mean.",
    "FVU foreign": "FVU on a second corpus that has nothing to do with the one of training, about that corpus' own "
    "mean: how much of the reconstruction holds for other text.",
    "explained variance (residual)": "1 minus the variance of the residual over the variance of the activations; "
    "unlike 1 - FVU it forgives a constant offset.",
    "explained variance (legacy)": "Mean over tokens of 1 minus a token's squared error over its squared distance to "
    "the mean; the older form of SAELens and SAEBench, dominated by tokens near the mean.",
    "CE recovered": "(CE_zero - CE_sae) / (CE_zero - CE_clean): the share of the next-token cross-entropy lost by "
    "zeroing the hook that the reconstruction wins back; 1 is lossless.",
    "KL recovered": "The same share for the Kullback-Leibler divergence from the clean model's predictions.",
    "cosine": "Mean cosine similarity of activation and reconstruction.",
    "MSE": "Mean squared error per element of the raw activations; it changes with their scale, so it compares only "
    "SAEs of one hook.",
    "dead": "Share of features that never fire on the held-out tokens.",
    "inactive": "Share of features that fire on at most 0.1% of the held-out tokens, dead ones included.",
    "seconds": "Time of the SAE's own training steps, in seconds; the reading of activations is its pack's.",
    "frontier": "An SAE is on the frontier of its hook where no other SAE of that hook has an L0 and an FVU that are "
    "both as low, and one of them lower. Controls are on none and beat nobody.",
    "matched": "Of two SAEs, the share of live features whose decoder direction has a cosine of at least 0.7 with one "
    "of the other's; the mean of both directions. Live features are those that fire on the held-out tokens.",
    "control": "An SAE to hold scores against. A score that a control reaches as well says nothing about what was "
    "learned: `neurons` takes the hook's own dimensions for features, `frozen_decoder` learns no directions, "
    "`random_model` reads a model with shuffled weights, `untrained` is the SAE as it began.",
}
"""What each measure means, in a sentence or two."""

CONTROLS_NEED = (
    "Controls show what a score is worth: what an untrained SAE, random directions, plain neurons or a scrambled model "
    "reach as well is no achievement of the training."
)

INDICATORS_CANNOT_TELL = (
    "These indicators cannot tell a good SAE from a bad one: a dense code can pass them all, and MSE depends on the "
    "scale of the activations. Read L0, FVU and CE recovered."
)


def is_missing(value: Any) -> bool:
    """Whether a measure was left out, or is not a number."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def fixed(value: Any, digits: int, *, missing: str = "-") -> str:
    """A number with thousands separators and `digits` decimals; `missing` where there is none."""
    return missing if is_missing(value) else f"{value:,.{digits}f}"


def percent(share: Any, digits: int = 1, *, missing: str = "-") -> str:
    """A share between 0 and 1 as a percentage."""
    return missing if is_missing(share) else f"{100 * share:.{digits}f}%"


def compact(value: Any, *, missing: str = "-") -> str:
    """A setting or a small measure in at most four significant digits: 3, 0.5, 0.01234, 1.2e-05."""
    return missing if is_missing(value) else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the sweep's table."""

    title: str
    key: str
    numeric: bool
    text: Callable[[Row], str]
    """The cell; missing values are '-'."""


def _measure(title: str, key: str, show: Callable[[Any], str]) -> Column:
    return Column(title, key, True, lambda row: show(row.get(key)))


def _setting(title: str, key: str) -> Column:
    return Column(title, key, False, lambda row: str(row.get(key) or "-"))


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the sweep's table for these rows.

    Architecture, width and seed appear only where they differ between SAEs that are no controls, `control` where there
    are some, `variant` where there are several, and FVU on foreign text where it was measured.
    """
    usual = [row for row in rows if not is_control(row)] or rows
    result = [_setting("hook", "hook")]
    if len({place(row) for row in rows}) > len({row["hook"] for row in rows}):
        result.append(_setting("output hook", "output_hook"))
    if _differ(usual, "kind"):
        result.append(_setting("kind", "kind"))
    if _differ(usual, "d_sae"):
        result.append(_measure("width", "d_sae", lambda v: fixed(v, 0)))
    if any(row.get("variant") for row in rows):
        result.append(_setting("other settings", "variant"))
    if any(map(is_control, rows)):
        result.append(_setting("control", "control"))
    result.append(_sparsity_column(rows))
    if _differ(usual, "seed"):
        result.append(_measure("seed", "seed", compact))
    return [*result, *(column for column in measure_columns(rows) if column.key != "kl_recovered")]


def measure_columns(rows: Sequence[Row]) -> list[Column]:
    """Every measure of a trained SAE; FVU on foreign text where any of these rows has it."""
    return [
        _measure("L0", "l0", lambda v: fixed(v, 1)),
        _measure("FVU", "fvu", lambda v: fixed(v, 3)),
        *([_measure("FVU foreign", "fvu_foreign", lambda v: fixed(v, 3))] if has_foreign(rows) else []),
        _measure("CE recovered", "ce_recovered", percent),
        _measure("KL recovered", "kl_recovered", percent),
        _measure("dead", "dead_share", percent),
        _measure("inactive", "inactive_share", percent),
        _measure("seconds", "seconds", lambda v: fixed(v, 0)),
    ]


def _sparsity_column(rows: Sequence[Row]) -> Column:
    for title, key in (("l1", "l1"), ("k", "k"), ("target L0", "target_l0")):
        if rows and all(row.get(key) is not None for row in rows):
            return _measure(title, key, compact)
    return _setting("sparsity", "sparsity_label")


def has_foreign(rows: Sequence[Row]) -> bool:
    """Whether any of these SAEs was measured on a second corpus."""
    return not all(is_missing(row.get("fvu_foreign")) for row in rows)


def strength(row: Row) -> tuple[str, float]:
    """What sets the sparsity, by name and value: ("l1", 3.0); infinite where the row does not tell."""
    for name, key in (("l1", "l1"), ("k", "k"), ("L0", "target_l0")):
        if row.get(key) is not None:
            return name, float(row[key])
    name, _, value = str(row.get("sparsity_label") or "").rpartition(" ")
    try:
        return name, float(value)
    except ValueError:
        return name, math.inf


def _differ(rows: Sequence[Row], key: str) -> bool:
    return len({row.get(key) for row in rows}) > 1


def families(rows: Sequence[Row], *, kinds: bool = False) -> list[str]:
    """What each SAE is besides its hook, sparsity setting, seed and control: `topk 4,608, to layer 12, lr 0.001`.

    Of architecture, width, the hook that is reconstructed and other settings what differs between these rows; "" where
    nothing does. kinds: the architecture in any case. Means are taken within one of them, at one hook and setting.
    """
    kinds, widths = kinds or _differ(rows, "kind"), _differ(rows, "d_sae")
    outputs = len({place(row) for row in rows}) > len({row["hook"] for row in rows})
    short = hook_names([place(row)[1] for row in rows]).short if outputs else {}
    found = []
    for row in rows:
        width = fixed(row.get("d_sae"), 0) if widths else ""
        kind = [str(row.get("kind")), width] if kinds else [width and f"{width} features"]
        parts = [" ".join(filter(None, kind)), outputs and f"to {short[place(row)[1]]}", row.get("variant")]
        found.append(", ".join(str(part) for part in parts if part))
    return found


def natural_key(text: str) -> tuple[tuple[int, float, str], ...]:
    """Sorts 'layers.9' before 'layers.10' and 'l1 0.5' before 'l1 3'."""
    parts = re.split(r"(\d+\.\d+|\d+)", text)
    return tuple((0, float(part), "") if part[:1].isdigit() else (1, 0.0, part) for part in parts if part)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows by layer, hook, architecture, width, variant, sparsity setting and seed; a hook's controls come last."""

    def key(row: Row) -> tuple[Any, ...]:
        return (
            _or_last(row.get("layer")),
            natural_key(str(row.get("hook") or "")),
            str(row["control"]) if is_control(row) else "",
            str(row.get("kind") or ""),
            _or_last(row.get("d_sae")),
            natural_key(str(row.get("variant") or "")),
            strength(row),
            _or_last(row.get("seed")),
            str(row.get("sae_id") or ""),
        )

    return sorted(rows, key=key)


def _or_last(number: float | None) -> float:
    return math.inf if number is None else number


@dataclass(frozen=True, slots=True)
class HookNames:
    """Short names for hooks that are shown together."""

    pattern: str
    """What the hooks share, `*` for what differs: `model.layers.*.mlp.down_proj`."""
    short: Mapping[str, str]
    """Full hook path -> short name, in the order given: `layer 10`."""


def hook_names(hooks: Sequence[str]) -> HookNames:
    """Cut what all hook paths share, in whole dotted segments; one hook keeps its full path."""
    unique = list(dict.fromkeys(hooks))
    if len(unique) < 2:
        return HookNames(unique[0] if unique else "", {hook: hook for hook in unique})
    paths = [hook.split(".") for hook in unique]
    shortest = min(map(len, paths))
    head = _shared(paths, shortest - 1)
    tail = _shared([path[::-1] for path in paths], shortest - 1 - head)
    middles = [path[head : len(path) - tail] for path in paths]
    pattern = ".".join([*paths[0][:head], "*", *(paths[0][-tail:] if tail else [])])
    if all(len(middle) == 1 and middle[0].isdigit() for middle in middles):
        return HookNames(pattern, {hook: f"layer {m[0]}" for hook, m in zip(unique, middles, strict=True)})
    return HookNames(pattern, {hook: ".".join(m) for hook, m in zip(unique, middles, strict=True)})


def _shared(paths: Sequence[Sequence[str]], limit: int) -> int:
    """How many first segments all paths share, at most `limit`."""
    return next((i for i in range(limit) if len({path[i] for path in paths}) > 1), max(limit, 0))


@dataclass(frozen=True, slots=True)
class Indicator:
    """One line of the quality box."""

    name: str
    goal: str
    """In words; empty for the measures that have no goal."""
    passing: str
    """How many SAEs pass, '2 of 9'; '-' for measures, and where nothing was measured."""
    best: str
    """Value of the best SAE, or of the whole run."""
    passed: bool | None
    """Whether that value passes; None without a goal or a value."""
    span: str
    """Smallest and largest value of the sweep."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality box: the indicators of the original project, beside the measures that say what they cannot."""

    indicators: tuple[Indicator, ...]
    measures: tuple[Indicator, ...]
    best_id: str | None
    """SAE that passes most indicators; among those, the one of lowest reconstruction loss."""


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    goal: str
    value: Callable[[Row], float | None]
    passes: Callable[[float], bool]
    show: Callable[[Any], str]


def _active(row: Row) -> float | None:
    return None if is_missing(row.get("inactive_share")) else 1 - row["inactive_share"]


_RULES = (
    _Rule("inactive features", "20-30%", lambda r: r.get("inactive_share"), lambda v: 0.2 <= v <= 0.3, percent),
    _Rule("active features", "70-80%", _active, lambda v: 0.7 <= v <= 0.8, percent),
    _Rule("reconstruction loss", "< 0.02", lambda r: r.get("mse"), lambda v: v < 0.02, compact),
)
_MEASURES = (
    ("L0", "l0", lambda v: fixed(v, 1)),
    ("FVU", "fvu", lambda v: fixed(v, 3)),
    ("CE recovered", "ce_recovered", percent),
)
MINUTES_GOAL = 13.0


def ce_error_notes(rows: Sequence[Row]) -> list[str]:
    """How exact CE recovered is, where that is known."""
    known = [100 * row["ce_recovered_error"] for row in rows if not is_missing(row.get("ce_recovered_error"))]
    if not known:
        return []
    least, most = f"{min(known):.1f}", f"{max(known):.1f}"
    points = least if least == most else f"{least} to {most}"
    return [f"CE recovered: standard error {points} points, over windows; evaluate.ce_tokens takes more of them"]


def quality(rows: Sequence[Row], minutes: float | None = None) -> Quality:
    """Judge a sweep by the original project's indicators.

    Args:
        rows: one per SAE; `mse` is per element of the raw activations.
        minutes: wall time of all runs of the sweep; None where it is not known.

    Controls are not judged.
    """
    rows = [row for row in rows if not is_control(row)]
    best = min(rows, key=_rank, default=None)
    indicators = [_judge(rule, rows, best) for rule in _RULES]
    in_time = None if is_missing(minutes) else minutes is not None and minutes < MINUTES_GOAL
    indicators.append(Indicator("minutes", f"< {MINUTES_GOAL:.0f}", "-", fixed(minutes, 1), in_time, "-"))
    measures = [
        Indicator(name, "", "-", show(best.get(key) if best else None), None, _span([r.get(key) for r in rows], show))
        for name, key, show in _MEASURES
    ]
    return Quality(tuple(indicators), tuple(measures), None if best is None else best.get("sae_id"))


def _passes(rule: _Rule, row: Row) -> bool | None:
    value = rule.value(row)
    return None if value is None or is_missing(value) else rule.passes(value)


def _rank(row: Row) -> tuple[int, float, str]:
    loss = row.get("mse")
    passed = sum(_passes(rule, row) is True for rule in _RULES)
    return (-passed, math.inf if loss is None or is_missing(loss) else loss, str(row.get("sae_id")))


def _judge(rule: _Rule, rows: Sequence[Row], best: Row | None) -> Indicator:
    verdicts = [verdict for row in rows if (verdict := _passes(rule, row)) is not None]
    passing = f"{sum(verdicts)} of {len(verdicts)}" if verdicts else "-"
    value = rule.value(best) if best else None
    passed = _passes(rule, best) if best else None
    return Indicator(rule.name, rule.goal, passing, rule.show(value), passed, _span(map(rule.value, rows), rule.show))


def _span(values: Any, show: Callable[[Any], str]) -> str:
    known = [value for value in values if not is_missing(value)]
    if not known:
        return "-"
    low, high = show(min(known)), show(max(known))
    return low if low == high else f"{low} to {high}"
