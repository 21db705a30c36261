"""`midiscover features`, `feature` and `interpret`: what the features of an SAE are, and which fire on a text."""

from __future__ import annotations

import argparse
import json
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from midiscover import featureview, tables
from midiscover.errors import ConfigError, CorpusError, NotFoundError
from midiscover.features.modules import text_lines
from midiscover.features.records import FeatureRecords, open_features
from midiscover.launch import Parser, parse_target, run_job
from midiscover.store.storage import Storage, open_store
from midiscover.targets import find_sae, find_target

LISTED = ("index", "count", "firing_rate", "mean", "max", "std")
"""Columns that features are sorted and filtered by."""
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
Condition = tuple[str, Callable[[Any, Any], bool], float]
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|>|<|=)\s*([-+0-9.eE]+)\s*")


def _features(argv: Sequence[str]) -> None:
    args = parse_target("features", argv, prog="midiscover features")
    find_target(open_store(args.store, create=False), args.target)  # what is wrong is said before torch is loaded
    run_job("features", argv)


def _feature(argv: Sequence[str]) -> None:
    parser = Parser(prog="midiscover feature", description="Look at the features of an SAE.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    listing = actions.add_parser("list", help="features by what they do")
    show = actions.add_parser("show", help="one feature with its contexts")
    for action in (listing, show):
        action.add_argument("sae", metavar="SAE", help="an SAE, or a unique beginning of its id")
        action.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
        action.add_argument("--json", action="store_true", help="as JSON")
    listing.add_argument("--sort", default="firing_rate", metavar="COLUMN", help=f"{', '.join(LISTED)} (firing_rate)")
    listing.add_argument("--asc", action="store_true", help="lowest first")
    listing.add_argument("--filter", default="", metavar="CONDITIONS", help="such as 'firing_rate>0.001,max>2'")
    listing.add_argument("--token", metavar="TEXT", help="only features with this among their top tokens")
    listing.add_argument("--limit", type=int, default=20, help="features shown at most (20)")
    show.add_argument("index", metavar="INDEX", type=int, help="number of the feature")
    show.add_argument("--contexts", type=int, default=6, help="contexts of each kind at most (6)")
    known = parser.parse_args(list(argv))
    records = _records(open_store(known.store, create=False), known.sae)
    if known.action == "list":
        _list(known, records)
        return
    row, contexts = records.feature(known.index), records.contexts(known.index)
    if known.json:
        print(json.dumps({"sae": records.sae_id, **row, "contexts": [c._asdict() for c in contexts]}, indent=1))
        return
    explanation = records.explanations.get(known.index)
    tables.show(featureview.page(records.sae_id, row, contexts, explanation, most=max(0, known.contexts)))


def _records(storage: Storage, name: str) -> FeatureRecords:
    return open_features(storage, find_sae(storage, name))


def _list(known: argparse.Namespace, records: FeatureRecords) -> None:
    if known.sort not in LISTED:
        raise ConfigError(f"--sort {known.sort} is no column of features; known are {', '.join(LISTED)}.")
    require_positive(limit=known.limit)
    conditions = parse_filter(known.filter)
    rows = fitting(records.rows([*LISTED, "top_tokens", "pos_tokens"]), conditions)
    if known.token is not None:
        wanted = known.token.strip().lower()
        rows = [row for row in rows if any(token.strip().lower() == wanted for token in row["top_tokens"])]
    rows.sort(key=lambda row: row[known.sort], reverse=not known.asc)
    if known.json:
        print(json.dumps(rows[: known.limit], indent=1))
        return
    tables.show(featureview.listing(rows[: known.limit], len(rows)))


def require_positive(**flags: int) -> None:
    """ConfigError for a flag below 1."""
    for name, value in flags.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be a whole number above 0.")


def fitting(rows: Sequence[dict[str, Any]], conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Rows that all conditions hold of."""
    return [row for row in rows if all(compare(row[name], value) for name, compare, value in conditions)]


def parse_filter(text: str) -> list[Condition]:
    """`firing_rate>0.001,max>2` as (column, comparison, value). ConfigError for anything else."""
    found = []
    for part in filter(None, text.split(",")):
        match = _CONDITION.fullmatch(part)
        if match is None or match[1] not in LISTED:
            raise ConfigError(
                f"--filter '{part}' is not understood; give conditions such as firing_rate>0.001, with the columns "
                f"{', '.join(LISTED)}."
            )
        try:
            found.append((match[1], _COMPARISONS[match[2]], float(match[3])))
        except ValueError:
            raise ConfigError(f"--filter '{part}': '{match[3]}' is not a number.") from None
    return found


def _interpret(argv: Sequence[str]) -> None:
    parser = Parser(prog="midiscover interpret", description="Which features fire on a text, token by token.")
    parser.add_argument("sae", metavar="SAE|SWEEP", help="an SAE or a sweep, by its id's beginning")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the text")
    parser.add_argument("--file", metavar="FILE", type=Path, help="a file of texts, one a line")
    parser.add_argument("--top", type=int, default=10, help="features shown at most (10)")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--json", action="store_true", help="as JSON")
    known = parser.parse_args(list(argv))
    require_positive(top=known.top)
    if (known.text is None) == (known.file is None):
        raise ConfigError("Give either a text or --file FILE.")
    texts = [known.text] if known.file is None else read_texts(known.file)
    storage = open_store(known.store, create=False)
    ids = find_target(storage, known.sae).saes
    from midiscover.interpret import encode_texts, load_language_model, summarise
    from midiscover.saes import load_sae

    saes = {sae: load_sae(sae, store=storage.uri) for sae in ids}
    lm = load_language_model(list(saes.values()), storage.uri)
    names = {sae: _top_tokens(storage, sae) for sae in ids}
    documents = []
    for text in encode_texts(lm, saes, texts):
        found = {sae: summarise(text, sae, top=known.top) for sae in ids}
        if known.json:
            documents.append(
                {"text": texts[text.number], "tokens": text.tokens}
                | {"saes": {sae: _plain(summary) for sae, summary in found.items()}}
            )
            continue
        for sae, summary in found.items():
            tables.show(featureview.interpretation(sae, summary, names[sae], top=known.top))
    if known.json:
        print(json.dumps(documents, indent=1))


def read_texts(path: Path) -> list[str]:
    """Lines of a text file that hold something. CorpusError where there is no file, or nothing in it."""
    texts = text_lines(path)
    if not texts:
        raise CorpusError(f"'{path}' holds no text; give a file with one text a line.")
    return texts


def _top_tokens(storage: Storage, sae: str) -> dict[int, list[str]]:
    """Feature -> its top tokens; nothing where the features are not written down."""
    try:
        table = open_features(storage, sae).table(["index", "top_tokens"])
    except NotFoundError:
        return {}
    return dict(zip(table["index"].to_pylist(), table["top_tokens"].to_pylist(), strict=True))


def _plain(summary: Any) -> dict[str, Any]:
    return {
        "features": [feature._asdict() for feature in summary.by_max],
        "by_mean": [feature._asdict() for feature in summary.by_mean],
        "per_token": [[feature._asdict() for feature in token] for token in summary.per_token],
    }


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "features": _features,
    "feature": _feature,
    "interpret": _interpret,
}
