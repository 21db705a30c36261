"""Colours and type of every chart: one restrained theme, legible on white and on dark ground.

All data colours have a contrast of at least 3:1 with both grounds (WCAG 2.2, 1.4.11), so that one chart serves the
light and the dark report; the first colours stay apart under protanopia and deuteranopia. Both are tested.
"""

from __future__ import annotations

from typing import Any

LIGHT_GROUND = "#ffffff"
DARK_GROUND = "#14171c"

HOOKS = ("#0072b2", "#d55e00", "#2f979e", "#5e48f0", "#8a6d4c", "#7f7f7f")
"""Categories: blue and vermillion of Okabe and Ito (2008), then those within both contrasts that lie farthest apart."""
RAMP = ("#3b6fd4", "#7b5cc4", "#b14aa6", "#d2476e", "#dd5b33", "#c77a00")
"""Ordered settings (l1, k), and layers where they are more than the categories: blue to orange."""
HEAT = ("#eef4fb", "#c3daf0", "#86b6e0", "#4787c7", "#1f5a9e", "#0b3266")
"""Values of a map, one hue from light to deep, so that lightness alone tells them in order. Cells are filled, so they
need no contrast with the ground; the numbers on them are black or white, whichever has more contrast."""

INK = "#1f2328"
INK_SOFT = "#57606a"
GRID = "#e6e8eb"
FONT = "Liberation Sans, Helvetica Neue, Arial, sans-serif"
FONT_MONO = "DejaVu Sans Mono, Liberation Mono, Menlo, Courier New, monospace"
"""Of tokens. All of these are 0.6 em wide, so that a layout made from the lengths of strings holds in each."""
TOKEN_GROUND = "#34d399"
"""Emerald, the ground of tokens on which a feature fires; ink on it has a contrast of 8:1."""

THEME: dict[str, Any] = {
    "background": LIGHT_GROUND,
    "font": FONT,
    "padding": 12,
    "view": {"stroke": None},
    "text": {"color": INK_SOFT},
    "axis": {
        "labelColor": INK_SOFT,
        "titleColor": INK,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "gridColor": GRID,
        "domainColor": "#b4bac2",
        "tickColor": "#b4bac2",
        "labelOverlap": "greedy",
        "labelSeparation": 4,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": INK_SOFT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 360,
        "titleLimit": 600,
        "orient": "bottom",
        "columnPadding": 18,
    },
    "header": {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 12,
        "labelFontWeight": "bold",
        "labelLimit": 220,
        "title": None,
    },
    "title": {
        "anchor": "start",
        "frame": "group",
        "color": INK,
        "fontSize": 15,
        "fontWeight": "bold",
        "subtitleColor": INK_SOFT,
        "subtitleFontSize": 12,
        "subtitlePadding": 5,
        "offset": 14,
    },
}
"""Vega-Lite config of every chart; the report changes only its inks and its ground on dark."""


def categories(n: int) -> list[str]:
    """`n` colours for names: categories while they last, then the ramp, as so many names are layers, in order."""
    return list(HOOKS[:n]) if n <= len(HOOKS) else ramp(n)


def ramp(n: int) -> list[str]:
    """`n` colours along the ramp, both ends included; one is its first."""
    if n < 2:
        return [RAMP[0]][:n]
    return [_between(i * (len(RAMP) - 1) / (n - 1)) for i in range(n)]


def on_heat(position: float) -> str:
    """Black or white, for a number on the cell at `position` (0 to 1) of a map's scale."""
    channels = [part / 255 for part in _channels(_between(position * (len(HEAT) - 1), HEAT))]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    # Where (luminance + 0.05) / 0.05 and 1.05 / (luminance + 0.05) are equal (WCAG 2.2, contrast ratio).
    return "#000000" if luminance > (0.05 * 1.05) ** 0.5 - 0.05 else "#ffffff"


def _between(position: float, colours: tuple[str, ...] = RAMP) -> str:
    """The colour at `position` of a ramp, mixed linearly in sRGB, which keeps the steps of these ramps even enough."""
    index = min(int(position), len(colours) - 2)
    share = position - index
    low, high = (_channels(colours[i]) for i in (index, index + 1))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(low, high, strict=True))


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
