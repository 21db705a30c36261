"""Features in the terminal: a listing, a page about one, and texts coloured by what fires. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from midiscover.features.explain import Average, averages, unread_answers
from midiscover.features.explanations import Explanation
from midiscover.features.records import QUANTILE_SHARES, Context
from midiscover.summary import fixed
from midiscover.tokens import shown

BARS = " ▁▂▃▄▅▆▇█"
_HISTOGRAM_COLUMNS = 64
_NONE, _FULL = (255, 255, 255), (16, 150, 105)
"""Ground of a token without activation and of the strongest: white to emerald, as on Neuronpedia."""
_SHOWN_LOGITS = 8


def quoted(tokens: Iterable[str], limit: int = 5) -> str:
    """Tokens one beside the other, with their spaces visible."""
    return "  ".join(f"'{shown(token)}'" for token in list(tokens)[:limit])


def coloured(tokens: Sequence[str], values: Sequence[float], highest: float, peak: int | None = None) -> Text:
    """Tokens on grounds whose depth is their activation; the one at `peak` is underlined.

    Without colours the text says as much: tokens that fire at more than half of `highest` stand in ⟦ ⟧, and so does
    the one at `peak` where it fires.
    """
    text = Text(overflow="fold")
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        share = min(1.0, value / highest) if highest > 0 and value > 0 else 0.0
        mark = share > 0.5 or (place == peak and share > 0)
        style = _ground(share) + (" underline" if place == peak else "")
        text.append("⟦" if mark else "", style="dim")
        text.append(shown(token), style=style)
        text.append("⟧" if mark else "", style="dim")
    return text


def _ground(share: float) -> str:
    if share <= 0:
        return ""
    depth = 0.05 + 0.95 * math.log10(1 + 9 * share)
    red, green, blue = (round(a + (b - a) * depth) for a, b in zip(_NONE, _FULL, strict=True))
    return f"black on #{red:02x}{green:02x}{blue:02x}"


def listing(rows: Sequence[Mapping[str, Any]], total: int) -> RenderableType:
    """Features: `index, firing_rate, mean, max, top_tokens, pos_tokens` of each; `total` is how many fit."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)  # the tokens share what the numbers leave
    for heading in ("feature", "fires on", "mean", "max"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=8)
    said = any(row.get("explanation") for row in rows)
    for heading in (*(["explanation"] if said else []), "top tokens", "promotes"):
        table.add_column(heading, overflow="ellipsis", no_wrap=True, ratio=2 if heading == "explanation" else 1)
    for row in rows:
        numbers = (f"{row['firing_rate']:.3%}", fixed(row["mean"], 2), fixed(row["max"], 2))
        texts = [escape(shown(row.get("explanation") or "-"))] if said else []
        tokens = (escape(quoted(row["top_tokens"])), escape(quoted(row["pos_tokens"])))
        table.add_row(str(row["index"]), *numbers, *texts, *tokens)
    return Group(table, Text(f"{len(rows):,} of {total:,} features", style="dim"))


def page(
    sae_id: str,
    row: Mapping[str, Any],
    contexts: Sequence[Context],
    explanation: Explanation | None = None,
    *,
    most: int,
) -> RenderableType:
    """Everything about one feature; of each kind of context at most `most`."""
    head = Text.assemble((f"feature {row['index']}", "bold"), f" of {sae_id}")
    if explanation is not None:
        scores = (("detection", explanation.detection), ("fuzz", explanation.fuzz))
        told = "".join(f", {name} {score:.2f}" for name, score in scores if score is not None)
        head.append(f"\n{shown(explanation.text)}", "italic").append(f"  by {explanation.llm}{told}", "dim")
    if not row["count"]:
        return Group(head, Text("It never fired on what was read."), _relations(row))
    facts = Text(
        f"fires on {row['firing_rate']:.4%} of the tokens ({row['count']:,}), mean {row['mean']:.3f}, std "
        f"{row['std']:.3f}, max {row['max']:.3f}"
    )
    shares = ", ".join(
        f"{share:.0%} {value:.2f}" for share, value in zip(QUANTILE_SHARES, row["quantiles"], strict=True)
    )
    histogram = Text.assemble(_bars(row["hist_heights"]), f"\n0 to {row['max']:.2f}, counts on a log scale")
    parts: list[RenderableType] = [head, facts, Text(f"quantiles where it fires: {shares}"), histogram, _relations(row)]
    titles = {"top": "Highest activations", "interval": "Drawn from intervals", "random": "Drawn at random"}
    for kind, title in titles.items():
        found = [context for context in contexts if context.kind == kind]
        if found and most > 0:
            parts.append(_contexts(title, spread(found, most), row["max"]))
    return Group(*(part for piece in parts for part in (piece, Text())))


_AVERAGED = {
    "detection": "detection",
    "fuzz": "fuzz",
    "tokens": "detection by the tokens at the peaks",
    "other": "detection by another feature's explanation",
    "other_fuzz": "fuzz by another feature's explanation",
}


def explained(sae_id: str, llm: str, outcome: Any, used: Mapping[str, int]) -> RenderableType:
    """What a language model said of features: `outcome` is an `explainer.Outcome`, `used` what a `Chat` counts."""
    entries = outcome.entries
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{sae_id}, by {llm}", title_justify="left", expand=True)
    table.add_column("feature", justify="right", no_wrap=True)
    table.add_column("explanation", ratio=1, overflow="fold")
    for heading in ("detection", "fuzz", "tokens", "another's"):
        table.add_column(heading, justify="right", no_wrap=True)
    for feature, entry in entries.items():
        beside = entry.get("baselines") or {}
        scores = (entry.get("detection"), entry.get("fuzz"), beside.get("tokens"), beside.get("other"))
        table.add_row(
            str(feature), Text(shown(entry["text"])), *(fixed((found or {}).get("score"), 2) for found in scores)
        )
    lines = [_average(average) for average in averages(entries.values())]
    lines += [
        f"{words}: {', '.join(map(str, found))}"
        for words, found in (
            ("fire in too few places to be explained and judged", outcome.seldom),
            ("the answer held no explanation", outcome.silent),
        )
        if found
    ]
    lines += [f"feature {feature}: {told}" for feature, told in outcome.refused.items()]
    unread, asked = unread_answers(entries.values())
    if unread:
        lines.append(f"{unread:,} of {asked:,} passages were judged by no list that could be read, and are left out")
    lines.append(f"{used['questions']:,} questions, {used['asked']:,} tokens asked and {used['answered']:,} answered")
    return Group(table, *(Text(line, style="dim") for line in lines))


def _average(average: Average) -> str:
    words = f"{_AVERAGED[average.name]}: {average.mean:.3f}{_error(average.error)} over {average.features:,} features"
    if average.apart is None:
        return f"{words} (0.5 is guessing)"
    return f"{words}; the explanations' is {average.apart:+.3f}{_error(average.apart_error)} beside it"


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"


def spread(contexts: Sequence[Context], most: int) -> list[Context]:
    """At most `most`: the first ones, or, of intervals, evenly over all of them."""
    if len(contexts) <= most:
        return list(contexts)
    if contexts[0].kind != "interval":
        return list(contexts[:most])
    return [contexts[len(contexts) * i // most] for i in range(most)]


def _contexts(title: str, contexts: Sequence[Context], highest: float) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", style="dim", no_wrap=True)
    for context in contexts:
        place = f"doc {context.document}" if context.document is not None else f"window {context.window}"
        text = coloured(context.tokens, context.values, highest, context.peak)
        table.add_row(f"{context.value:.2f}", text, place)
    return table


def _relations(row: Mapping[str, Any]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, title in (("pos", "promotes"), ("neg", "suppresses")):
        pairs = zip(row[f"{name}_tokens"][:_SHOWN_LOGITS], row[f"{name}_values"], strict=False)
        grid.add_row(title, Text("  ".join(f"'{shown(token)}' {value:+.2f}" for token, value in pairs) or "-"))
    for name, measure, title in (
        ("neighbour", "cosine", "nearest directions"),
        ("coactive", "pearson", "fires together with"),
        ("neuron", "value", "neurons in its direction"),
        ("input", "pearson", "inputs it follows"),
    ):
        pairs = zip(row[f"{name}_index"], row[f"{name}_{measure}"], strict=True)
        grid.add_row(title, Text("  ".join(f"{index} ({value:+.2f})" for index, value in list(pairs)[:5]) or "-"))
    return grid


def _bars(heights: Sequence[int]) -> Text:
    columns = min(_HISTOGRAM_COLUMNS, len(heights))
    edges = [len(heights) * i // columns for i in range(columns + 1)]
    sums = [sum(heights[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    top = math.log1p(max(sums))
    return Text("".join(BARS[math.ceil(math.log1p(n) / top * (len(BARS) - 1))] for n in sums), style="green")


def interpretation(sae_id: str, text: Any, names: Mapping[int, Sequence[str]], *, top: int) -> RenderableType:
    """What an SAE sees in a text: `text` is an `interpret.TextSummary`; names: feature -> its top tokens, if known."""
    features = text.by_max[:top]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=sae_id, title_justify="left")
    for heading in ("feature", "max", "mean"):
        table.add_column(heading, justify="right")
    table.add_column("where it fires", ratio=1)
    if names:
        table.add_column("its top tokens", overflow="ellipsis", no_wrap=True, max_width=36)
    for found in features:
        known = [escape(quoted(names.get(found.feature, ()), 3))] if names else []
        tokens = coloured(text.tokens, found.values, found.max, found.position)
        table.add_row(str(found.feature), f"{found.max:.2f}", f"{found.mean:.2f}", tokens, *known)
    if not features:
        return Group(Text(sae_id, style="italic"), Text("No feature fires on this text."))
    per_token = Table.grid(padding=(0, 2))
    for token, strongest in zip(text.tokens, text.per_token, strict=True):
        best = "  ".join(f"{feature.feature} ({feature.value:.2f})" for feature in strongest[:5])
        per_token.add_row(Text(shown(token), style="bold"), Text(best or "-"))
    return Group(table, Text("Strongest features of each token", style="bold"), per_token)
