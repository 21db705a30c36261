"""A chart as a file: PNG, SVG, PDF, a page that opens offline, and the numbers behind it as CSV. Needs no network."""

from __future__ import annotations

import csv as csv_module
import html as html_module
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from midiscover.digests import cache_dir, write_atomically
from midiscover.errors import UserError
from midiscover.figures.drawing import Chart
from midiscover.palette import FONT_MONO

Table = Sequence[Mapping[str, Any]]

DRAWN = {
    "colour",
    "line",
    "note",
    "ink",
    "ground",
    "left",
    "right",
    "start",
    "top",
    "middle",
    "bottom",
    "align",
    "bold",
}
"""Columns of a chart's data that only place or colour a mark. CSV is without them, and without those of DRAWN_ENDS."""
DRAWN_ENDS = ("_text", "_ink", "_head")
"""Of columns that say another one in words, in the colour of its words, or as a heading."""

_VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NO_CHARACTER = "\U0010ffff"
"""No font has a glyph for it, by the Unicode standard."""
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'">
<title>{title}</title>
</head>
<body>
<div id="chart"></div>
<script type="application/json" id="specification">{specification}</script>
<script>{script}</script>
<script>
vegaEmbed("#chart", JSON.parse(document.getElementById("specification").textContent), {{
  actions: {{ export: true, source: false, compiled: false, editor: false }}, ast: true, renderer: "svg"
}});
</script>
</body>
</html>
"""


def png(chart: Chart, scale: float = 2) -> bytes:
    """The chart as PNG, `scale` pixels per CSS pixel."""
    return vl_convert.vegalite_to_png(_drawable_json(chart), vl_version=_VEGA_LITE, scale=scale)


def svg(chart: Chart) -> str:
    """The chart as SVG."""
    return vl_convert.vegalite_to_svg(_drawable_json(chart), vl_version=_VEGA_LITE)


def pdf(chart: Chart) -> bytes:
    """The chart as a PDF of one page, its text as text."""
    return vl_convert.vegalite_to_pdf(_drawable_json(chart), vl_version=_VEGA_LITE)


def html(chart: Chart) -> str:
    """A page with the chart and everything that draws it; it forbids itself any request."""
    # In JSON a "<" may be written as its escape, so that no string of the data can end the element.
    specification = json.dumps(chart.to_dict(), sort_keys=True).replace("<", "\\u003c")
    return _PAGE.format(
        title=html_module.escape(_title(chart)), specification=specification, script=embedded_javascript()
    )


def csv(chart: Chart) -> str:
    """The numbers behind a chart: a line per row of its data, the union of all columns but those that only draw it.

    Where a chart has several tables, the first column, `table`, names them.
    """
    tables = data(chart)
    known = dict.fromkeys(column for rows in tables.values() for row in rows for column in row)
    columns = [column for column in known if column not in DRAWN and not column.endswith(DRAWN_ENDS)]
    named = len(tables) > 1
    file = io.StringIO()
    writer = csv_module.writer(file, lineterminator="\n")
    writer.writerow([*(["table"] if named else []), *columns])
    for name, rows in tables.items():
        for row in rows:
            cells = [row.get(column) for column in columns]
            writer.writerow([*([name] if named else []), *("" if cell is None else cell for cell in cells)])
    return file.getvalue()


def data(chart: Chart) -> dict[str, Table]:
    """The tables inside a chart, by their names (`data`, `data 2`, ... where they have none)."""
    found: dict[str, Table] = {}
    for part in _data(chart.to_dict()):
        if "name" not in part and any(part["values"] == rows for rows in found.values()):
            continue
        usual = "data" if not found else f"data {len(found) + 1}"
        found[part.get("name", usual)] = part["values"]
    return found


def _data(spec: Any) -> Iterator[dict[str, Any]]:
    if isinstance(spec, list):
        for part in spec:
            yield from _data(part)
    elif isinstance(spec, dict):
        if isinstance(spec.get("data"), dict) and "values" in spec["data"]:
            yield spec["data"]
        for key, part in spec.items():
            if key != "data":
                yield from _data(part)


FORMATS: dict[str, Callable[[Chart], bytes]] = {
    ".png": png,
    ".svg": lambda chart: svg(chart).encode(),
    ".pdf": pdf,
    ".html": lambda chart: html(chart).encode(),
    ".csv": lambda chart: csv(chart).encode(),
}
"""What a chart is saved as, by the suffix of the file."""
RASTERED = (".png", ".pdf")
"""Formats that are drawn with the fonts of this machine; the others with those of the reader's."""


def require_format(path: str | Path) -> str:
    """The suffix of a file in which a chart can be saved. UserError for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"A chart can't be saved as '{path}'; the name may end in {', '.join(FORMATS)}.")
    return suffix


def save(chart: Chart, path: str | Path) -> None:
    """Write the chart in the format that the suffix names. UserError for another suffix, or where nothing can be
    written.
    """
    data = FORMATS[require_format(path)](chart)
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UserError(f"'{path}' can't be written: {error.strerror}.") from error


def save_png(chart: Chart, path: str | Path, scale: float = 2) -> None:
    """Write the chart as PNG, `scale` pixels per CSS pixel."""
    Path(path).write_bytes(png(chart, scale))


def save_svg(chart: Chart, path: str | Path) -> None:
    """Write the chart as SVG."""
    Path(path).write_text(svg(chart), encoding="utf-8")


def undrawable(chart: Chart) -> str:
    """The characters in a chart's data and titles that no font of this machine has: boxes in a PNG or PDF."""
    values = (value for rows in data(chart).values() for row in rows for value in row.values())
    texts = (text for text in (*values, *_titles(chart.to_dict())) if isinstance(text, str))
    return "".join(sorted(character for character in set().union(*texts) if not _has_glyph(character)))


def _titles(spec: Any) -> Iterator[Any]:
    """What stands under `title`, `subtitle` and `text` at any depth, lists of lines one by one."""
    for key, part in spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, list) else ():
        if key in ("title", "subtitle", "text"):
            yield from part if isinstance(part, list) else [part]
        if key != "data":
            yield from _titles(part)


@cache
def _has_glyph(character: str) -> bool:
    # A character without a glyph is drawn as the box that one which never has any is drawn as.
    return character.isspace() or _drawn(character) != _drawn(_NO_CHARACTER)


@cache
def _drawn(character: str) -> bytes:
    text = f'<text x="4" y="16" font-family="{FONT_MONO}" font-size="12">{html_module.escape(character)}</text>'
    return vl_convert.svg_to_png(f'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24">{text}</svg>')


def javascript() -> str:
    """Vega, Vega-Lite and vega-embed in the versions of these charts, as one script that sets `vegaEmbed`.

    Bundling takes seconds, so the script is kept in the user's cache folder, if there is one to write to.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: no home folder
        kept = cache_dir() / f"vega-{version('vl-convert-python')}-{_VEGA_LITE}.js"
        if not kept.exists():
            write_atomically(kept, _bundled().encode())
        return kept.read_text(encoding="utf-8")
    return _bundled()


@cache
def _bundled() -> str:
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VEGA_LITE)


@cache
def embedded_javascript() -> str:
    """The same for a script element: what would end it, if it stood in a string, is written otherwise."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", javascript(), flags=re.IGNORECASE)


def _title(chart: Chart) -> str:
    title = chart.to_dict().get("title", "")
    text = title.get("text", "") if isinstance(title, dict) else title
    return text if isinstance(text, str) else " ".join(text)


def _drawable_json(chart: Chart) -> str:
    return json.dumps(_drawable(chart.to_dict()), sort_keys=True)


def _drawable(value: Any) -> Any:
    """The same with a point for each character that XML can't hold: an SVG has tokens in the texts of its tooltips."""
    if isinstance(value, str):
        return _NOT_IN_XML.sub("\N{MIDDLE DOT}", value)
    if isinstance(value, dict):
        return {name: _drawable(inner) for name, inner in value.items()}
    return [_drawable(inner) for inner in value] if isinstance(value, list) else value
