"""Concept scores in the terminal: the features of one SAE for one concept, and which SAE carries which best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from midiscover.featureview import quoted
from midiscover.ids import hook_label, recorded_settings, sparsity_label

Document = Mapping[str, Any]
_OTHERS = {"neurons": "raw neurons", "untrained": "untrained SAE"}


def concept_table(document: Document, tokens: Mapping[int, Sequence[str]]) -> RenderableType:
    """Top features of one SAE; tokens: feature -> its top tokens, where they are known."""
    title = (
        f"{document['concept']}: {document['texts']} texts against {document['controls']} ({document['controls_are']})"
    )
    table = _table(title)
    for heading in ("feature", "AUROC", "of mean", "effect", "p", "family-wise p", "q, all texts"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    table.add_column("", no_wrap=True, min_width=6)
    table.add_column("top tokens", overflow="ellipsis", no_wrap=True, ratio=1)
    for row in document["sae_scores"]["features"]:
        numbers = [f"{row[name]:.3f}" for name in ("auroc", "auroc_mean", "effect")]
        chances = [_chance(row[name]) for name in ("p", "family_wise_p", "q_all_texts")]
        passes = Text("passes", style="green") if row["passes"] else Text("-", style="dim")
        table.add_row(
            str(row["feature"]), *numbers, *chances, passes, escape(quoted(tokens.get(row["feature"], ()), 4))
        )
    lines = [
        f"{words}: held-out AUROC of the top features {document[name]['auroc_held_out']:.3f} +- "
        f"{document[name]['auroc_error']:.3f}, {document[name]['passing']} pass"
        for name, words in _OTHERS.items()
        if name in document
    ]
    return Group(table, *(Text(line, style="dim") for line in lines), Text(f"Verdict: {document['verdict']}"), Text())


def sweep_tables(documents: Sequence[Document], tokens: Mapping[str, Mapping[int, Sequence[str]]]) -> RenderableType:
    """For each concept the SAE that carries it best, and a map of all SAEs by concept."""
    concepts = list(dict.fromkeys(document["concept"] for document in documents))
    saes = list(dict.fromkeys(document["sae"] for document in documents))
    at = {(document["sae"], document["concept"]): document for document in documents}
    scores = _table("Held-out AUROC of the top features (in brackets: how many pass)")
    scores.add_column("SAE", no_wrap=True)
    for concept in concepts:
        scores.add_column(concept[:14], justify="right", no_wrap=True)
    for sae in saes:
        cells = []
        for concept in concepts:
            group = at[sae, concept]["sae_scores"]
            best = max(at[other, concept]["sae_scores"]["auroc_held_out"] for other in saes)
            style = "bold" if group["auroc_held_out"] == best else ""
            cells.append(Text(f"{group['auroc_held_out']:.2f} ({group['passing']})", style=style))
        scores.add_row(_name(at[sae, concepts[0]]), *cells)
    best = _table("Where each concept is carried best")
    for heading in ("concept", "SAE"):
        best.add_column(heading, no_wrap=True, min_width=16)
    for heading in ("feature", "AUROC", "neurons", "untrained"):
        best.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    best.add_column("top tokens", overflow="ellipsis", no_wrap=True, ratio=1)
    for concept in concepts:
        document = max((at[sae, concept] for sae in saes), key=lambda d: d["sae_scores"]["auroc_held_out"])
        row = max(document["sae_scores"]["features"], key=lambda row: row["auroc"])
        others = [f"{document[name]['auroc_held_out']:.2f}" if name in document else "-" for name in _OTHERS]
        known = escape(quoted(tokens[document["sae"]].get(row["feature"], ()), 4))
        best.add_row(concept, _name(document), str(row["feature"]), f"{row['auroc']:.2f}", *others, known)
    beaten = sum("neurons" in document["better_than"] for document in documents)
    note = (
        f"{beaten} of {len(documents)} pairs of SAE and concept tell more than raw neurons, beyond two standard errors."
    )
    return Group(scores, Text(), best, Text(note))


def _name(document: Document) -> str:
    of = document["of"]
    return f"{hook_label(of['hook'])} {of['sae']['kind']} {sparsity_label(recorded_settings(of['sae']))}"


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
