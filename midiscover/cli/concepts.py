"""`midiscover concepts`: which features of an SAE, or of the SAEs of a sweep, stand for a concept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from midiscover import conceptview, tables
from midiscover.errors import ConfigError, NotFoundError
from midiscover.features.modules import Concept, module_names, read_module, read_own
from midiscover.features.records import open_features
from midiscover.launch import Parser
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from midiscover.targets import Target, find_target


def _parser() -> Parser:
    parser = Parser(
        prog="midiscover concepts",
        description="Score features on texts with and without a concept, beside raw neurons and an untrained SAE.",
        epilog="Features are ranked on one half of the texts and judged on the other. A feature passes where its "
        "held-out AUROC is beyond what 1,000 shuffles of the labels give to the best of the top features (5 %).",
    )
    parser.add_argument("target", metavar="SAE|SWEEP|CONFIG", help="by the beginning of its id, or a config")
    parser.add_argument("--module", action="append", default=[], metavar="NAME", help=f"{', '.join(module_names())}")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="texts of your own, one a line")
    parser.add_argument("--controls", type=Path, metavar="FILE", help="texts without the concept, to go with --texts")
    parser.add_argument("--top-features", type=int, default=10, help="features that are judged (10)")
    parser.add_argument("--no-baselines", action="store_true", help="leave out raw neurons and the untrained SAE")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the shuffles")
    parser.add_argument("--shuffles", type=int, default=1000, help="shuffles of the labels (1,000)")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    return parser


def _concepts(argv: Sequence[str]) -> None:
    known = _parser().parse_args(list(argv))
    for name in ("top_features", "shuffles"):
        if getattr(known, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(known, name)}; it must be a whole number above 0."
            )
    concepts = _chosen(known.module, known.texts, known.controls)
    storage = open_store(known.store, create=False)
    target = find_target(storage, known.target)
    documents = _judged(storage, target, concepts, known)
    if known.json:
        print(json.dumps(documents, indent=1))
        return
    tokens = {sae: _top_tokens(storage, sae) for sae in target.saes}
    if len(target.saes) == 1:
        for document in documents:
            tables.show(conceptview.concept_table(document, tokens[document["sae"]]))
        return
    tables.show(conceptview.sweep_tables(documents, tokens))


def _chosen(modules: Sequence[str], texts: Path | None, controls: Path | None) -> list[Concept]:
    if texts is None:
        if controls is not None:
            raise ConfigError("--controls goes with --texts; modules have controls of their own.")
        return [read_module(name) for name in modules or module_names()]
    if modules:
        raise ConfigError("Give either --module or --texts.")
    return [read_own(texts, controls)]


def _judged(storage: Storage, target: Target, concepts: Sequence[Concept], known: Any) -> list[dict[str, Any]]:
    from midiscover.features.concepts import ConceptSettings, document_bytes, judge, score_texts
    from midiscover.interpret import load_language_model
    from midiscover.saes import load_sae

    settings = ConceptSettings(
        top_features=known.top_features, seed=known.seed, shuffles=known.shuffles, baselines=not known.no_baselines
    )
    saes = {sae: load_sae(sae, store=storage.uri) for sae in target.saes}
    lm = load_language_model(list(saes.values()), storage.uri)
    documents = []
    for concept in concepts:
        scores = score_texts(lm, saes, [*concept.texts, *concept.controls], settings)
        for sae, loaded in saes.items():
            facts = {name: (loaded.record or {}).get(name) for name in ("hook", "layer", "sae")}
            document = {"sae": sae} | judge(concept, scores[sae], settings) | {"of": facts}
            storage.write(layout.concept_scores(sae, concept.name), document_bytes(document))
            documents.append(document)
    return documents


def _top_tokens(storage: Storage, sae: str) -> Mapping[int, Sequence[str]]:
    try:
        table = open_features(storage, sae).table(["index", "top_tokens"])
    except NotFoundError:
        return {}
    return dict(zip(table["index"].to_pylist(), table["top_tokens"].to_pylist(), strict=True))


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"concepts": _concepts}
