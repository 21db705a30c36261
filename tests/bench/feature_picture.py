"""The README's picture: features of the demo with a person's name for each and their highest contexts, as PNG.

    python -m tests.bench.feature_picture --store STORE --out FILE SAE=INDEX=NAME ...

Drawn by the terminal's own renderer (rich), turned to PNG by vl-convert.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import vl_convert
from rich.console import Console, Group
from rich.table import Table
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from midiscover.features.records import open_features
from midiscover.featureview import coloured, quoted
from midiscover.saes import find_sae
from midiscover.store.storage import Storage, open_store

CONTEXTS, WIDTH, AROUND = 4, 104, 10
THEME = TerminalTheme((255, 255, 255), (31, 35, 40), [(31, 35, 40)] * 8, [(31, 35, 40)] * 8)


def card(storage: Storage, words: str) -> Group:
    """One feature: its name, facts and contexts."""
    sae, index, name = words.split("=", 2)
    records = open_features(storage, find_sae(storage, sae))
    row = records.feature(int(index))
    head = Text.assemble((name, "bold"), (f"   feature {index} of {records.sae_id.rpartition('.')[0]}", "dim"))
    facts = (
        f"fires on {row['firing_rate']:.2%} of tokens, max {row['max']:.1f}; promotes {quoted(row['pos_tokens'], 5)}"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim")
    table.add_column(no_wrap=True, overflow="crop", width=WIDTH - 10)
    for context in [c for c in records.contexts(int(index)) if c.kind == "top"][:CONTEXTS]:
        first, last = max(0, context.peak - AROUND), context.peak + AROUND - 2
        text = coloured(context.tokens[first:last], context.values[first:last], row["max"], context.peak - first)
        table.add_row(f"{context.value:.1f}", Text.assemble(*_without_marks(text)))
    return Group(head, Text(facts, style="dim"), table, Text())


def _without_marks(text: Text) -> list[tuple[str, str]]:
    """Pieces with their styles, without the brackets that serve terminals without colours."""
    found, place = [], 0
    for span in sorted(text.spans, key=lambda span: span.start):
        found.append((text.plain[place : span.start], ""))
        found.append((text.plain[span.start : span.end], str(span.style)))
        place = span.end
    return [(piece, style) for piece, style in [*found, (text.plain[place:], "")] if piece not in "⟦⟧"]


def main() -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("features", nargs="+", metavar="SAE=INDEX=NAME")
    args = parser.parse_args()
    storage = open_store(args.store, create=False)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for words in args.features:
        console.print(card(storage, words))
    svg = console.export_svg(title="midiscover feature show", theme=THEME)
    args.out.write_bytes(vl_convert.svg_to_png(svg, scale=1.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
