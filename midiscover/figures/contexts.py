"""Contexts of a feature as text on grounds of its activations: every token placed by the lengths of strings.

No browser wraps this text, so that a feature with its contexts is one picture, the same everywhere.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import altair as alt

from midiscover.figures.drawing import Chart, finish
from midiscover.palette import FONT_MONO, INK, INK_SOFT, TOKEN_GROUND
from midiscover.scales import rounded
from midiscover.tokens import shown

CHARACTER, LINE, FONT_SIZE = 6.63, 19, 11
"""Pixels from one character to the next (0.602 em), from one line to the next, and of the font."""
GUTTER, PLACE = 44, 62
"""Pixels left of the text, for the value at the peak, and right of it, for the place in the corpus."""
CONTEXT_GAP, GROUP_GAP = 5, 24
"""Pixels between two contexts, and above those of another kind, for their heading."""
WIDTH = 876
"""Pixels of the whole chart without the theme's padding, so that it fits into 900."""
LEAST = 5e-5
"""Activations below have no ground, as on Neuronpedia."""
HEADINGS = {"top": "Highest activations", "interval": "Drawn from intervals", "random": "Drawn at random"}
CUT = "…"
DEPTH = "The deeper a token's ground, the stronger the feature there; underlined: the token a context is about"


class TokenContext(Protocol):
    """A stretch of text around one token, such as `features.records.Context`."""

    @property
    def kind(self) -> str:
        """A key of HEADINGS, or a heading."""
        ...

    @property
    def bin_min(self) -> float | None:
        """Lower edge of the interval it was drawn from."""
        ...

    @property
    def value(self) -> float:
        """Activation at the peak."""
        ...

    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def values(self) -> Sequence[float]: ...
    @property
    def peak(self) -> int:
        """Place among `tokens` of the token it is about."""
        ...

    @property
    def window(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def document(self) -> int | None: ...


def contexts_chart(
    contexts: Sequence[TokenContext],
    highest: float | None = None,
    *,
    title: str = "Contexts",
    lines: int = 4,
    width: int = WIDTH,
) -> Chart:
    """Contexts beneath each other, in the order given, with a heading where another kind begins.

    Args:
        contexts: may be none.
        highest: activation of the deepest ground, the feature's maximum; else the highest of these contexts.
        title: of the chart.
        lines: of a context at most; of a longer one, what stands around its peak.
        width: pixels of the chart without its padding.

    The peak is underlined, its value stands on the left. Tokens follow one another from left to right in every script.
    """
    return finish(contexts_panel(contexts, highest, lines=lines, width=width), title, [DEPTH] if contexts else [])


def contexts_panel(
    contexts: Sequence[TokenContext],
    highest: float | None,
    *,
    lines: int,
    width: int = WIDTH,
    name: str = "",
) -> alt.LayerChart | alt.FacetChart:
    """The chart without title and theme, to stand among others. name: goes before the names of its two tables."""
    highest = highest or max((value for context in contexts for value in context.values), default=0.0)
    tokens, notes, height = layout(contexts, highest, lines=lines, width=width)
    x, y = (
        {"scale": alt.Scale(domain=[0, size], nice=False, zero=False, reverse=flip), "axis": None}
        for size, flip in ((width, False), (height, True))
    )
    base = alt.Chart()
    tooltip = [alt.Tooltip("token:N"), alt.Tooltip("value:Q", format=".4f")]
    grounds = (
        base.transform_filter("datum.ground > 0")
        .mark_rect(color=TOKEN_GROUND, cornerRadius=2)
        .encode(
            x=alt.X("left:Q", **x),
            x2="right:Q",
            y=alt.Y("top:Q", **y),
            y2="bottom:Q",
            opacity=alt.Opacity("ground:Q", scale=None, legend=None),
            tooltip=tooltip,
        )
    )
    peaks = (
        base.transform_filter("datum.peak")
        .mark_rule(strokeWidth=1.5, color=INK)
        .encode(x=alt.X("left:Q", **x), x2="right:Q", y=alt.Y("bottom:Q", **y))
    )
    text = {"font": FONT_MONO, "fontSize": FONT_SIZE, "baseline": "middle", "color": INK}
    words = base.mark_text(align="left", **text).encode(
        x=alt.X("start:Q", **x), y=alt.Y("middle:Q", **y), text="text:N", tooltip=tooltip
    )
    written = []
    sides: tuple[tuple[Any, bool], ...] = (("left", True), ("left", False), ("right", False))
    for align, bold in sides:
        weight = "bold" if bold else "normal"
        written.append(
            base.transform_filter(f"datum.align === '{align}' && datum.bold === {str(bold).lower()}")
            .mark_text(align=align, baseline="middle", fontSize=FONT_SIZE, fontWeight=weight, color=INK_SOFT)
            .encode(x=alt.X("left:Q", **x), y=alt.Y("middle:Q", **y), text="text:N")
        )
    # A layer of two, each with its table: of six, every one would repeat its own.
    of_tokens = alt.layer(grounds, peaks, words, data=alt.InlineData(values=tokens, name=f"{name}tokens"))
    of_notes = alt.layer(*written, data=alt.InlineData(values=notes, name=f"{name}notes"))
    return alt.layer(of_tokens, of_notes).properties(width=width, height=height)


def layout(
    contexts: Sequence[TokenContext], highest: float, *, lines: int, width: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """(tokens, notes, height): a mapping per token and per heading, value and place, in pixels from the upper left."""
    columns = int((width - GUTTER - PLACE) / CHARACTER)
    tokens: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    top, kind = 0, None
    for number, context in enumerate(contexts):
        if context.kind != kind:
            kind = context.kind
            top += GROUP_GAP if number else GROUP_GAP - 8
            notes.append(_note(HEADINGS.get(kind, kind), 0, top - 10, bold=True))
        place = f"doc {context.document}" if context.document is not None else f"window {context.window}"
        notes.append(_note(f"{context.value:.2f}", GUTTER - 8, top + LINE / 2, align="right"))
        notes.append(_note(place, width, top + LINE / 2, align="right"))
        line = 0
        for line, column, piece in placed(_around_peak(context, columns * lines), columns):
            tokens.append({"context": number, **_token(piece, GUTTER + column * CHARACTER, top + line * LINE, highest)})
        top += (line + 1) * LINE + CONTEXT_GAP
    return tokens, notes, max(int(top), LINE)


class _Piece:
    """A token as it is drawn."""

    def __init__(self, token: str, value: float, *, peak: bool = False) -> None:
        self.token, self.value, self.peak = token, value, peak
        self.text = shown(token)

    @property
    def columns(self) -> int:
        return cells(self.text)


def _around_peak(context: TokenContext, room: int) -> list[_Piece]:
    """The tokens around the peak that fit into `room` columns, with a mark where something was cut off."""
    pieces = [
        _Piece(token, float(value), peak=place == context.peak)
        for place, (token, value) in enumerate(zip(context.tokens, context.values, strict=True))
    ]
    if sum(piece.columns for piece in pieces) <= room:
        return pieces
    first = last = min(max(context.peak, 0), len(pieces) - 1)
    # Words are not broken, so lines may end early: an eighth is left for that.
    left = room - room // 8 - pieces[first].columns - 2
    while first > 0 or last < len(pieces) - 1:
        before = pieces[first - 1].columns if first > 0 else math.inf
        after = pieces[last + 1].columns if last < len(pieces) - 1 else math.inf
        # What a reader needs most is what came before: two tokens of it for one that follows.
        forward = before == math.inf or (context.peak - first > 2 * (last - context.peak) and after < math.inf)
        step = after if forward else before
        if step > left:
            break
        left -= int(step)
        first, last = (first, last + 1) if forward else (first - 1, last)
    head = [_Piece(CUT, 0.0)] if first > 0 else []
    tail = [_Piece(CUT, 0.0)] if last < len(pieces) - 1 else []
    return [*head, *pieces[first : last + 1], *tail]


def placed(pieces: Iterable[Any], columns: int) -> Iterable[tuple[int, int, Any]]:
    """(line, column, piece) of each; a piece stands on one line, and one wider than that is cut."""
    line = column = 0
    for piece in pieces:
        if piece.columns > columns:
            piece.text = cut(piece.text, columns)
        if column + piece.columns > columns:
            line, column = line + 1, 0
        yield line, column, piece
        column += piece.columns


def _token(piece: _Piece, left: float, top: float, highest: float) -> dict[str, Any]:
    text = piece.text.lstrip(" ")
    indent = len(piece.text) - len(text)
    return {
        "token": piece.token,
        "value": rounded(piece.value),
        # Spaces that follow one another would be drawn as one.
        "text": text.replace(" ", "\N{NO-BREAK SPACE}"),
        "ground": ground(piece.value, highest),
        "peak": piece.peak,
        "left": round(left, 2),
        "right": round(left + piece.columns * CHARACTER, 2),
        "start": round(left + indent * CHARACTER, 2),
        "top": top + 1,
        "middle": top + LINE / 2,
        "bottom": top + LINE - 2,
    }


def _note(text: str, left: float, middle: float, *, align: str = "left", bold: bool = False) -> dict[str, Any]:
    return {"text": text, "left": left, "middle": middle, "align": align, "bold": bold}


def ground(value: float, highest: float) -> float:
    """Opacity of a token's ground: Neuronpedia's 0.05 + 0.95 log10(1 + 9 value / highest)."""
    if value < LEAST or highest <= 0:
        return 0.0
    return round(0.05 + 0.95 * math.log10(1 + 9 * min(1.0, value / highest)), 4)


def cells(text: str) -> int:
    """Columns of a monospaced font that a text takes: 2 for wide characters, none for marks on another one."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, columns: int) -> str:
    """The text, or as much of it as leaves a column for the mark that it goes on."""
    if cells(text) <= columns:
        return text
    kept = text
    while kept and cells(kept) > columns - 1:
        kept = kept[:-1]
    return kept + CUT
