"""`midiscover concepts`: which features of an SAE, or of the SAEs of a sweep, stand for a concept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from midiscover import conceptview, tables
from midiscover.cli.features import require_positive
from midiscover.errors import ConfigError, NotFoundError
from midiscover.features.modules import SAE, Concept, module_names, read_module, read_own
from midiscover.features.records import open_features
from midiscover.frontier import is_control
from midiscover.ids import recorded_seed
from midiscover.launch import Parser
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from midiscover.targets import find_target

DRAWN_FEATURES = 2
"""Features of each concept in the heat map of an SAE."""

Documents = list[dict[str, Any]]
HeldOut = dict[tuple[str, str], Sequence[float]]
"""(SAE, concept) -> held-out AUROC of every feature."""


def _parser() -> Parser:
    parser = Parser(
        prog="midiscover concepts",
        description="Score features on texts with and without a concept, beside raw neurons and an untrained SAE.",
        epilog="Features are ranked on one half of the texts and judged on the other. A feature passes where its "
        "held-out AUROC is beyond what 1,000 shuffles of the labels give to the best of the top features (5 %).",
    )
    parser.add_argument("target", metavar="SAE|SWEEP|CONFIG", help="by the beginning of its id, or a config")
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{', '.join(module_names())}; may stand several times (default: all)",
    )
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts of your own, one a line")
    parser.add_argument(
        "--controls",
        type=Path,
        metavar="FILE",
        help="texts without the concept, to go with --texts; else controls of all modules that are as long",
    )
    parser.add_argument("--top-features", type=int, default=10, metavar="N", help="features that are judged (10)")
    parser.add_argument("--no-baselines", action="store_true", help="leave out raw neurons and the untrained SAE")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split and the shuffles (0)")
    parser.add_argument("--shuffles", type=int, default=1000, metavar="N", help="shuffles of the labels (1,000)")
    parser.add_argument("--model", metavar="MODEL", help="where the language model is, if not where it was")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw a heat map of each SAE there, PNG and HTML")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    return parser


def _concepts(argv: Sequence[str]) -> None:
    known = _parser().parse_args(list(argv))
    require_positive(top_features=known.top_features, shuffles=known.shuffles)
    concepts = _chosen(known.module, known.texts, known.controls)
    storage = open_store(known.store, create=False)
    saes = find_target(storage, known.target).saes
    if known.out is not None:
        _make_folder(known.out)
    documents, held_out = _judged(storage, saes, concepts, known)
    if known.json:
        print(json.dumps(documents, indent=1))
    elif len(saes) == 1:
        tables.show(conceptview.sae_tables(documents, _top_tokens(storage, saes[0])))
    else:
        tables.show(conceptview.sweep_tables(documents))
    if known.out is not None:
        _draw(known.out, documents, held_out)


def _chosen(modules: Sequence[str], texts: Path | None, controls: Path | None) -> list[Concept]:
    if texts is None:
        if controls is not None:
            raise ConfigError("--controls goes with --texts; modules have controls of their own.")
        return [read_module(name) for name in dict.fromkeys(modules) or module_names()]
    if modules:
        raise ConfigError("Give either --module or --texts.")
    return [read_own(texts, controls)]


def _judged(
    storage: Storage, names: Sequence[str], concepts: Sequence[Concept], known: argparse.Namespace
) -> tuple[Documents, HeldOut]:
    """A document for each concept and SAE, in this order; each is written as soon as it is there."""
    from midiscover.cards import default_device
    from midiscover.features.concepts import ConceptSettings
    from midiscover.interpret import load_language_model
    from midiscover.saes import LoadedSae, load_sae

    settings = ConceptSettings(top_features=known.top_features, seed=known.seed, shuffles=known.shuffles)
    device = default_device()
    groups: dict[str, dict[str, LoadedSae]] = {}
    for name in names:
        loaded = load_sae(name, store=storage.uri, device=device)
        groups.setdefault(_model_of(loaded.record), {})[name] = loaded
    documents: dict[tuple[str, str], dict[str, Any]] = {}
    held_out: HeldOut = {}
    for saes in groups.values():
        lm = load_language_model(list(saes.values()), storage.uri, model=known.model, device=device)
        for concept in concepts:
            print(f"concepts: {concept.name}", file=sys.stderr)
            for name, document, scores in _of_concept(lm, saes, concept, settings, known):
                storage.write(
                    layout.concept_scores(name, concept.name), (json.dumps(document, indent=1) + "\n").encode()
                )
                documents[name, concept.name] = document
                held_out[name, concept.name] = scores
    order = [(name, concept.name) for concept in concepts for name in names]
    return [documents[key] for key in order], held_out


def _of_concept(
    lm: Any, saes: Mapping[str, Any], concept: Concept, settings: Any, known: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any], Sequence[float]]]:
    """(SAE, its document, held-out AUROC of every feature where that is drawn)."""
    from midiscover.features.concept_scores import score_texts
    from midiscover.features.concepts import Judge

    scored = score_texts(lm, saes, [*concept.texts, *concept.controls], baselines=not known.no_baselines)
    judge = Judge(concept, settings)
    for name, loaded in saes.items():
        record = loaded.record or {}
        facts = {key: record.get(key) for key in ("hook", "output_hook", "layer", "d_sae", "sae", "train")}
        document = {"sae": name} | judge.document(scored.of[name], scored.tokens)
        document["of"] = facts | {"seed": recorded_seed(record)}
        yield name, document, judge.held_out(scored.of[name][SAE]).tolist() if known.out is not None else ()


def _model_of(record: Mapping[str, Any] | None) -> str:
    """Tells language models apart; a sweep may hold SAEs of one with shuffled weights as well."""
    model = (record or {}).get("lineage", {}).get("model", {})
    return json.dumps([model.get("digest"), model.get("weights")])


def _top_tokens(storage: Storage, sae: str) -> Mapping[int, Sequence[str]]:
    try:
        table = open_features(storage, sae).table(["index", "top_tokens"])
    except NotFoundError:
        return {}
    return dict(zip(table["index"].to_pylist(), table["top_tokens"].to_pylist(), strict=True))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder of --out, '{folder}', can't be made: {error.strerror}.") from None


def _draw(folder: Path, documents: Documents, held_out: HeldOut) -> None:
    """A heat map of each SAE's features, and of a sweep its layers and sparsity settings by concept."""
    from midiscover.figures import concept_chart, concept_map_chart
    from midiscover.figures.saving import save

    saes = list(dict.fromkeys(document["sae"] for document in documents))
    rows = conceptview.map_rows(documents)
    mapped = len(saes) > 1 and not all(map(is_control, rows))
    charts = {"concept-map": concept_map_chart(rows)} if mapped else {}
    for sae, name in conceptview.short_names(saes).items():
        mine = [document for document in documents if document["sae"] == sae]
        charts[f"{sae}.concepts"] = concept_chart(conceptview.heat_rows(mine, held_out, DRAWN_FEATURES, name=name))
    for name, chart in charts.items():
        for suffix in (".png", ".html"):
            save(chart, folder / f"{name}{suffix}")
    print(f"concepts: {len(charts)} pictures in {folder}", file=sys.stderr)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"concepts": _concepts}
