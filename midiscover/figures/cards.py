"""A feature on one card: what it is in words, its histogram, its tokens, and contexts that show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import altair as alt

from midiscover.figures.activations import (
    LOGITS,
    NEVER,
    activation_panel,
    blank,
    fires_on,
    logit_panels,
    panel_width,
    token_label,
)
from midiscover.figures.contexts import WIDTH, TokenContext, contexts_panel, cut
from midiscover.figures.drawing import Chart
from midiscover.palette import THEME
from midiscover.summary import Row

TOP, LOWER = 6, 3
"""Contexts of a card: the highest, and those drawn from different intervals below."""
CONTEXT_LINES = 2
NAMED = 5
"""Tokens and features named in a line at most."""
LOGIT_BAR, LOGIT_NUMBER, PANEL_GAP, AXIS_ROOM = 78, 36, 22, 58
"""Pixels of the longest bar of the logits, of the number beside it, between panels, and of the histogram's axis."""
SUBTITLE_COLUMNS = 140
"""Characters of a line below the title, which fit into 900 pixels."""


class Card(NamedTuple):
    """What `feature_card` draws."""

    row: Row
    """A feature's row of `features.parquet`."""
    contexts: Sequence[TokenContext]
    """All its contexts; the card chooses."""
    title: str | None = None


def feature_card(feature_row: Row, contexts: Sequence[TokenContext], title: str | None = None) -> Chart:
    """A feature on one card, 900 pixels wide: facts, histogram of activations, logits, and up to 9 contexts.

    title: 'Feature 17' where it is left out.
    """
    return _card(Card(feature_row, contexts, title), "").configure(**THEME)


def feature_cards(cards: Iterable[Card]) -> Chart:
    """Several cards beneath each other."""
    drawn = [_card(card, f"{place} ") for place, card in enumerate(cards, 1)]
    return alt.vconcat(*drawn, spacing=32).configure(**THEME)


def chosen(contexts: Sequence[TokenContext], top: int = TOP, lower: int = LOWER) -> list[TokenContext]:
    """The highest contexts of different texts, then one each from up to `lower` intervals beneath, evenly over all."""
    result, known = [], set()
    for context in contexts:
        if context.kind == "top" and len(result) < top and tuple(context.tokens) not in known:
            result.append(context)
            known.add(tuple(context.tokens))
    least = min((context.value for context in result), default=math.inf)
    drawn: dict[object, TokenContext] = {}
    for context in contexts:
        if context.kind == "interval" and context.value < least and tuple(context.tokens) not in known:
            drawn.setdefault(context.bin_min, context)
    below = sorted(drawn.values(), key=lambda context: -context.value)
    if len(below) > lower:
        below = [below[len(below) * (2 * i + 1) // (2 * lower)] for i in range(lower)]
    return [*result, *below]


def _card(card: Card, name: str) -> alt.VConcatChart:
    """name: goes before the names of its tables, which differ between cards."""
    row, width = card.row, WIDTH
    panels = logit_panels(row, bar=LOGIT_BAR, name=name)
    if row["count"]:
        # The histogram stands last, where its axis does not push the contexts to the right.
        taken = sum(
            panel_width(row[f"{side}_tokens"][:LOGITS], LOGIT_BAR) + LOGIT_NUMBER + PANEL_GAP
            for side in ("pos", "neg")
            if row[f"{side}_tokens"]
        )
        width = WIDTH if panels else WIDTH - AXIS_ROOM
        panels.append(activation_panel(row, log=None, width=WIDTH - AXIS_ROOM - taken, name=name))
    shown = chosen(card.contexts)
    parts: list[alt.LayerChart | alt.FacetChart | alt.HConcatChart] = (
        [alt.hconcat(*panels, spacing=PANEL_GAP)] if panels else []
    )
    if shown:
        parts.append(contexts_panel(shown, row["max"], lines=CONTEXT_LINES, width=width, name=name))
    if not parts:
        parts.append(blank("", WIDTH, 1))
    lines = [cut(line, SUBTITLE_COLUMNS) for line in _facts(row)]
    heading = alt.TitleParams(card.title or f"Feature {row['index']}", subtitle=lines)
    return alt.vconcat(*parts, spacing=14).properties(title=heading)


def _facts(row: Row) -> list[str]:
    lines = [fires_on(row) if row["count"] else f"{NEVER}."]
    if row["top_tokens"]:
        # Ordinary spaces side by side would be drawn as one.
        between = 3 * "\N{NO-BREAK SPACE}"
        lines.append("Strongest on " + between.join(token_label(token) for token in row["top_tokens"][:NAMED]))
    for words, found, values in (
        ("Nearest directions", row["neighbour_index"], row["neighbour_cosine"]),
        ("Fires together with", row["coactive_index"], row["coactive_pearson"]),
    ):
        if len(found):
            pairs = zip(found[:NAMED], values, strict=False)
            lines.append(f"{words} " + ", ".join(f"{index} ({value:.2f})" for index, value in pairs))
    return lines
