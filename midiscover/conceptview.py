"""Concept scores in the terminal: the features of one SAE for each concept, and which SAE carries which best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from midiscover.features.modules import BASELINES
from midiscover.featureview import quoted
from midiscover.frontier import is_control
from midiscover.ids import compared_settings, recorded_settings, sparsity_label, variants
from midiscover.summary import hook_names
from midiscover.tables import Fitted

Document = Mapping[str, Any]
Tokens = Mapping[int, Sequence[str]]
"""Feature -> its top tokens, where they are known."""
WORDS = ("highest here", "top tokens")
WORDS_WIDTH = 24
"""Characters that a column of words is given room for; it takes what is left."""
COLUMN_NAMES = ("feature", "by", "AUROC\nof max", "AUROC\nof mean", "d", "p", "family\nwise p", "q", "", *WORDS)
SPARED = ("p", "q", "d", "top tokens", "AUROC\nof mean")
"""Columns that a narrow terminal does without, in this order."""
COLUMNS = 9
"""SAEs beside one another in a table."""
MARK = "*"
_MIN_WIDTHS = {"by": 4, "d": 5, "p": 6, "q": 6, "": 6, "family\nwise p": 6}
_OTHERS = {"neurons": "raw\nneurons", "directions": "random\ndirect.", "untrained": "un-\ntrained", "length": "tokens"}
_LEGEND = (
    "AUROC, d (Cohen) and p (Mann-Whitney, one-sided): on the texts that the ranking did not see. by: whether a "
    "feature's highest or its mean activation scores a text, chosen with the rank. p family: against the best of these "
    "features under shuffled labels; below 0.05 it passes. q: Benjamini-Hochberg over all features, all texts."
)


def sae_tables(documents: Sequence[Document], tokens: Tokens) -> RenderableType:
    """The top features of one SAE for each concept, and on how many concepts it beats what was not trained."""
    parts = [concept_table(document, tokens) for document in documents]
    ends = [Text(_beaten(documents))] if len(documents) > 1 and documents[0]["against"] else []
    return Group(*parts, *ends, Text(_LEGEND, style="dim"))


def concept_table(document: Document, tokens: Tokens) -> RenderableType:
    """The top features of one SAE for one concept, what stands beside them, and the verdict.

    Where words have no room, columns of SPARED are left out, the first ones first.
    """
    table = Fitted(*(partial(_concept_table, document, tokens, SPARED[:less]) for less in range(len(SPARED) + 1)))
    beside = [Text(line, style="dim") for line in _beside(document)]
    return Group(table, *beside, Text(document["verdict"]), Text())


def _concept_table(document: Document, tokens: Tokens, spared: Sequence[str]) -> Table:
    sizes = f"{len(document['texts'])} texts, {len(document['controls'])} controls ({document['controls_are']})"
    table = _table(f"{document['concept']}: {sizes}")
    rows = [_cells(row, tokens) for row in document["sae_scores"]["features"]]
    shown = [heading for heading in COLUMN_NAMES if heading not in spared and (heading != "top tokens" or tokens)]
    for heading in shown:
        if heading in WORDS:
            needed = min(WORDS_WIDTH, max(len(heading), *(len(str(cells[heading])) for cells in rows)))
            table.add_column(
                heading, overflow="ellipsis", no_wrap=True, ratio=needed, vertical="bottom", max_width=WORDS_WIDTH
            )
            continue
        justify = "left" if heading in ("by", "") else "right"
        table.add_column(
            heading, justify=justify, no_wrap=True, min_width=_MIN_WIDTHS.get(heading, 7), vertical="bottom"
        )
    for cells in rows:
        table.add_row(*(cells[heading] for heading in shown))
    return table


def _cells(row: Mapping[str, Any], tokens: Tokens) -> dict[str, RenderableType]:
    """A feature's cells, by the names of their columns."""
    areas = [Text(f"{row[f'auroc_{by}']:.3f}", style="bold" if by == row["by"] else "") for by in ("max", "mean")]
    chances = [_chance(row[name]) for name in ("p", "family_wise_p", "q_all_texts")]
    passes = Text("passes", style="green") if row["passes"] else Text("-", style="dim")
    words = [escape(quoted(found, 4)) for found in (row.get("peaks", ()), tokens.get(row["feature"], ()))]
    cells = (str(row["feature"]), row["by"], *areas, f"{row['effect']:.2f}", *chances, passes, *words)
    return dict(zip(COLUMN_NAMES, cells, strict=True))


def _beside(document: Document) -> Iterator[str]:
    for name, words in BASELINES.items():
        if name not in document:
            continue
        group = document[name]
        most = len(group["features"])
        average = f"top {most} on average {group['auroc_held_out']:.3f} ± {group['auroc_error']:.3f}, "
        yield (
            f"{words}: {'first ' if most > 1 else ''}{group['auroc_first']:.3f} ± {group['auroc_first_error']:.3f}, "
            f"{average if most > 1 else ''}{group['passing']} pass{'' if most > 1 else 'es'}"
        )


def sweep_tables(documents: Sequence[Document]) -> RenderableType:
    """A map of concepts by SAEs (layer and sparsity), and for each concept the SAE that carries it best, no control."""
    concepts = list(dict.fromkeys(document["concept"] for document in documents))
    saes = list(dict.fromkeys(document["sae"] for document in documents))
    at = {(document["sae"], document["concept"]): document for document in documents}
    learned = [document for document in documents if not is_control(document["of"]["sae"] or {})] or list(documents)
    best = {
        concept: max((document for document in learned if document["concept"] == concept), key=_strength)
        for concept in concepts
    }
    maps = [
        _map([at[sae, c] for sae in saes[i : i + COLUMNS] for c in concepts], documents, best, first=i == 0)
        for i in range(0, len(saes), COLUMNS)
    ]
    among = len({document["sae"] for document in learned})
    notes = [
        f"{MARK} it passes: beyond the best of the top features under shuffled labels. Bold: the best of its concept, "
        f"picked by the score that is shown among {among}, which flatters it a little.",
        *(["Controls are neither picked nor counted."] if len(learned) < len(documents) else []),
        *([_beaten(learned)] if documents[0]["against"] else []),
    ]
    return Group(*maps, _best_table(best, short_names(saes)), *map(Text, notes))


def _strength(document: Document) -> tuple[float, float]:
    return document["sae_scores"]["auroc_first"], document["sae_scores"]["auroc_held_out"]


def _map(
    shown: Sequence[Document], documents: Sequence[Document], best: Mapping[str, Document], *, first: bool
) -> RenderableType:
    table = _table("Held-out AUROC of the feature that ranked first" if first else "", expand=False)
    table.add_column("concept", no_wrap=True, min_width=14)
    columns = list(dict.fromkeys(document["sae"] for document in shown))
    headings = _headings(documents)
    for sae in columns:
        table.add_column(headings[sae], justify="right", no_wrap=True)
    for concept in best:
        cells = []
        for document in (document for document in shown if document["concept"] == concept):
            mark = MARK if document["sae_scores"]["features"][0]["passes"] else " "
            style = "bold" if document is best[concept] else ""
            cells.append(Text(f"{document['sae_scores']['auroc_first']:.2f}{mark}", style=style))
        table.add_row(concept, *cells)
    return table


def _best_table(best: Mapping[str, Document], names: Mapping[str, str]) -> RenderableType:
    table = _table("Where each concept is carried best")
    table.add_column("concept", no_wrap=True, min_width=14)
    table.add_column("SAE", no_wrap=True, min_width=max(len(names[document["sae"]]) for document in best.values()))
    for heading in ("feature", "AUROC", *_OTHERS.values()):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7, vertical="bottom")
    table.add_column("highest here", overflow="ellipsis", no_wrap=True, ratio=1)
    for concept, document in best.items():
        row = document["sae_scores"]["features"][0]
        others = [f"{document[name]['auroc_first']:.2f}" if name in document else "-" for name in _OTHERS]
        words = quoted(row.get("peaks", ()), 4)
        table.add_row(
            concept, names[document["sae"]], str(row["feature"]), f"{row['auroc']:.2f}", *others, escape(words)
        )
    return table


def _headings(documents: Sequence[Document]) -> dict[str, str]:
    """SAE -> layer, sparsity and what else the SAEs differ in; the end of its id where that does not tell it apart."""
    firsts = {document["sae"]: document["of"] for document in documents}
    names = hook_names([str(of["hook"]) for of in firsts.values()])
    settings = {sae: of["sae"] or {} for sae, of in firsts.items()}
    differ = [key for key in ("kind", "control") if len({s.get(key, "none") for s in settings.values()}) > 1]
    counted = [key for key in ("d_sae", "seed") if len({of[key] for of in firsts.values()}) > 1]
    headings = {}
    for (sae, of), other in zip(firsts.items(), variants(list(firsts.values())), strict=True):
        try:
            place = [names.short[str(of["hook"])]] if len(names.short) > 1 else []
            lines = [*place, sparsity_label(recorded_settings(settings[sae]))]
        except (KeyError, TypeError, ValueError):  # of another origin
            lines = [sae[-12:]]
        lines += [str(settings[sae].get(key, "none")) for key in differ]
        lines += [f"{key} {of[key]}" for key in counted]
        headings[sae] = "\n".join([*lines, *(other.split(", ") if other else [])])
    shared = Counter(headings.values())
    return {sae: f"{told}\n{sae.rpartition('.')[2]}" if shared[told] > 1 else told for sae, told in headings.items()}


def _beaten(documents: Sequence[Document]) -> str:
    """On how many pairs of SAE and concept the first feature is better than what was not trained."""
    counts = [
        f"{words} on {sum(document['against'][name]['first']['told'] == 'better than' for document in documents)}"
        for name, words in BASELINES.items()
        if all(name in document["against"] for document in documents)
    ]
    pairs = "concepts" if len({document["sae"] for document in documents}) == 1 else "pairs of SAE and concept"
    beaten = ", ".join(counts)
    return f"Of {len(documents)} {pairs}, the first feature beats the first of {beaten}, by two standard errors."


def heat_rows(
    documents: Sequence[Document],
    held_out: Mapping[tuple[str, str], Sequence[float]],
    most: int,
    *,
    name: str,
) -> list[dict[str, Any]]:
    """The first `most` features of each concept of one SAE, each on every concept, as `figures.concept_chart` reads it.

    held_out: (SAE, concept) -> held-out AUROC of every feature's highest activation, for features that were not judged;
    the others have the score that they were judged by. name: of the SAE, for people.
    """
    chosen = {row["feature"]: None for document in documents for row in document["sae_scores"]["features"][:most]}
    rows = []
    for feature in chosen:
        for document in documents:
            judged = next((row for row in document["sae_scores"]["features"] if row["feature"] == feature), None)
            auroc = judged["auroc"] if judged else held_out[document["sae"], document["concept"]][feature]
            cell = {"sae_id": document["sae"], "concept": document["concept"], "feature": feature, "auroc": auroc}
            rows.append(cell | {"passes": bool(judged and judged["passes"]), "label": name})
    return rows


def map_rows(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """The feature that ranked first, of each SAE and concept, as `figures.concept_map_chart` reads it."""
    rows = []
    for document in documents:
        of, first = document["of"], document["sae_scores"]["features"][0]
        settings = compared_settings(recorded_settings(of["sae"])) if of["sae"] else {"sparsity_label": "-"}
        place = {"sae_id": document["sae"], "hook": of["hook"], "layer": of["layer"], **settings}
        rows.append(place | {"concept": document["concept"], **{k: first[k] for k in ("feature", "auroc", "passes")}})
    return rows


def short_names(saes: Sequence[str]) -> dict[str, str]:
    """SAE -> its id without the hash, which people begin an id with; the whole of it where that is another's as well,
    as of two seeds.
    """
    short = {sae: sae.rpartition(".")[0] or sae for sae in saes}
    shared = Counter(short.values())
    return {sae: sae if shared[name] > 1 else name for sae, name in short.items()}


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}"


def _table(title: str, *, expand: bool = True) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        expand=expand,
        title=title or None,
        title_justify="left",
        title_style="bold",
    )
