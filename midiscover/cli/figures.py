"""`midiscover figure`: one chart of a sweep or an SAE as a file; as CSV, the numbers behind it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midiscover.errors import ConfigError, CorruptError, NotFoundError
from midiscover.frontier import is_control
from midiscover.launch import Parser
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from midiscover.targets import Target, find_target

if TYPE_CHECKING:
    from midiscover.figures import Chart

OF_SWEEP = {
    "frontier": "FVU against L0",
    "foreign": "FVU on foreign text against FVU on held-out text",
    "losses": "training curves; --measure names another measure than the loss",
    "density": "how often features fire, of every SAE",
    "layer-density": "how often features fire, by layer",
    "shares": "dead and inactive features of every SAE",
    "map": "layers by sparsity settings",
    "stability": "features that neighbours on the grid have in common",
    "concept-map": "which layer and sparsity carries a concept best",
}
OF_SAE = {
    "card": "all about a feature: facts, histogram, tokens, contexts; several --feature beneath each other",
    "contexts": "all contexts of a feature",
    "activations": "histogram of a feature's activations",
    "logits": "tokens that a feature promotes and suppresses",
    "dead": "features by how often they fire, from never on",
    "norms": "norms of the encoder's directions",
}
OF_BOTH = {"concepts": "heat map of concepts by features, of an SAE or of each SAE of a sweep"}
OF_FEATURE = ("card", "contexts", "activations", "logits")
"""Charts that need --feature."""
MEASURES = ("loss", "mse", "l0", "fvu")
TOLD_CHARACTERS = 20
"""Characters without a font that are named at most."""


def _parser() -> Parser:
    names = "\n".join(f"  {name:14}{text}" for name, text in {**OF_SWEEP, **OF_SAE, **OF_BOTH}.items())
    parser = Parser(
        prog="midiscover figure",
        description="Draw a chart of a sweep or an SAE.",
        epilog=f"charts of a sweep, and below, from card on, of an SAE:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="SWEEP|SAE|CONFIG", help="by the beginning of its id, or a config")
    parser.add_argument("name", metavar="CHART", help="its name, see below")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="its end says what: png svg pdf html csv"
    )
    parser.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="INDEX[=TITLE]",
        help="number of a feature, and what to call it",
    )
    parser.add_argument("--measure", choices=MEASURES, help="of losses (loss)")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    return parser


def require_folder(out: Path) -> None:
    """ConfigError where the folder of `--out` is not there."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"There is no folder {out.absolute().parent} for --out; make it first.")


def _figure(argv: Sequence[str]) -> None:
    known = _parser().parse_args(list(argv))
    if known.name not in {**OF_SWEEP, **OF_SAE, **OF_BOTH}:
        raise ConfigError(f"'{known.name}' is no chart; known are {', '.join({**OF_SWEEP, **OF_SAE, **OF_BOTH})}.")
    wanted = [parse_feature(text) for text in known.feature]
    if bool(wanted) != (known.name in OF_FEATURE) or (len(wanted) > 1 and known.name != "card"):
        need = {True: "needs one --feature INDEX", False: "takes no --feature"}[known.name in OF_FEATURE]
        raise ConfigError(f"The chart {known.name} {need}.")
    if known.measure is not None and known.name != "losses":
        raise ConfigError(f"The chart {known.name} takes no --measure; losses does.")
    # What is wrong is said before anything is read; Altair takes a second to load.
    from midiscover import figures
    from midiscover.figures.saving import RASTERED, require_format

    suffix = require_format(known.out)
    require_folder(known.out)
    storage = open_store(known.store, create=False)
    chart = draw(storage, find_target(storage, known.target), known.name, wanted, known.measure or "loss")
    figures.save(chart, known.out)
    missing = figures.undrawable(chart) if suffix in RASTERED else ""
    if missing:
        print(
            f"{len(missing)} characters have no font on this machine and are boxes in the picture: "
            f"{missing[:TOLD_CHARACTERS]}",
            file=sys.stderr,
        )
    print(known.out)


def parse_feature(text: str) -> tuple[int, str | None]:
    """`17=Numbers` as (17, 'Numbers'). ConfigError for what is no number."""
    index, _, title = text.partition("=")
    if not index.strip().isdecimal():
        raise ConfigError(
            f"--feature '{text}' is not understood; give a number, or a number and a title as 17=Numbers."
        )
    return int(index), title.strip() or None


def draw(
    storage: Storage,
    target: Target,
    name: str,
    features: Sequence[tuple[int, str | None]] = (),
    measure: Any = "loss",
) -> Chart:
    """The chart of that name. ConfigError where it is one of another kind of thing; NotFoundError without its data."""
    if name in OF_BOTH or name == "concept-map":
        from midiscover import figures

        if name == "concept-map" and len(target.saes) < 2:
            raise ConfigError(f"The chart {name} compares the SAEs of a sweep; {', '.join(target.saes)} is one SAE.")
        rows = concept_rows(storage, target.saes)
        if name == "concepts":
            return figures.concept_chart(rows)
        _require_trained(rows, name, target.sweep_id or target.saes[0])
        return figures.concept_map_chart(rows)
    if name in OF_SWEEP:
        if target.record is None:
            raise ConfigError(f"The chart {name} is of a sweep, and {target.saes[0]} is an SAE; name its sweep.")
        return _of_sweep(storage, target.record, name, measure)
    if target.sweep_id is not None:
        raise ConfigError(f"The chart {name} is of one SAE; give one of this sweep, such as {target.saes[0]}.")
    if name == "norms":
        return _norms(storage, target.saes[0])
    return _of_sae(storage, target.saes[0], name, features)


def _of_sweep(storage: Storage, sweep: Mapping[str, Any], name: str, measure: Any) -> Chart:
    from midiscover import figures
    from midiscover.results import sweep_results
    from midiscover.summary import has_foreign
    from midiscover.tracking.sweepfiles import read_stability

    if name == "stability":
        pairs = read_stability(storage, sweep["id"])
        if not pairs:
            raise NotFoundError(f"The sweep {sweep['id']} compares no SAEs: none of its grid are neighbours.")
        return figures.stability_chart(pairs)
    results = sweep_results(storage, sweep)
    if not results.rows:
        raise NotFoundError(f"No SAE of {sweep['id']} is measured yet; run `midiscover sweep` again to go on.")
    if name == "foreign" and not has_foreign(results.rows):
        raise NotFoundError(f"The SAEs of {sweep['id']} were measured on no foreign text; set evaluate.foreign_source.")
    if name in ("map", "layer-density"):
        _require_trained(results.rows, name, sweep["id"])
    drawn: dict[str, Callable[[], Chart]] = {
        "frontier": lambda: figures.frontier_chart(results.rows),
        "foreign": lambda: figures.foreign_chart(results.rows),
        "losses": lambda: figures.curve_chart(results.curves, measure),
        "density": lambda: figures.density_chart(results.densities),
        "layer-density": lambda: figures.layer_density_chart(results.densities),
        "shares": lambda: figures.share_chart(results.rows),
        "map": lambda: figures.map_chart(results.rows),
    }
    return drawn[name]()


def _require_trained(rows: Sequence[Mapping[str, Any]], name: str, sweep: str) -> None:
    """NotFoundError where there are controls only, for charts without them."""
    if all(map(is_control, rows)):
        raise NotFoundError(f"The chart {name} leaves controls out, and {sweep} has results of controls only.")


def _of_sae(storage: Storage, sae: str, name: str, features: Sequence[tuple[int, str | None]]) -> Chart:
    from midiscover import figures
    from midiscover.features.records import open_features

    records = open_features(storage, sae)
    if name == "dead":
        rates = records.table(["firing_rate"])["firing_rate"].to_pylist()
        return figures.dead_chart([{"value": rate} for rate in rates], subtitle=[records.source])
    names = [f"{title} (feature {index})" if title else "" for index, title in features]
    cards = [
        figures.Card(records.feature(index), records.contexts(index), name or f"Feature {index} of {sae}")
        for (index, _), name in zip(features, names, strict=True)
    ]
    card = cards[0]
    if name == "card":
        return figures.feature_cards(cards) if len(cards) > 1 else figures.feature_card(*card)
    if name == "contexts":
        return figures.contexts_chart(card.contexts, card.row["max"], title=card.title or "Contexts")
    draw = figures.activation_chart if name == "activations" else figures.logit_chart
    return draw(card.row, of=sae, name=names[0])


def _norms(storage: Storage, sae: str) -> Chart:
    from midiscover import figures
    from midiscover.saes import load_trained

    module = load_trained(storage, sae)
    encoder, decoder = module.W_enc.detach().norm(dim=0), module.W_dec.detach().norm(dim=1)
    low, high = f"{float(decoder.min()):.4g}", f"{float(decoder.max()):.4g}"
    told = (
        f"Decoder directions have norms from {low} to {high}" if low != high else f"Decoder directions have norm {low}"
    )
    rows = [{"value": norm} for norm in encoder.tolist()]
    return figures.histogram_chart(rows, "Norms of encoder directions", "Norm", subtitle=[f"Of {sae}", told])


def concept_rows(storage: Storage, saes: Sequence[str]) -> list[dict[str, Any]]:
    """A row per SAE, concept and judged feature, from concepts/*.json. NotFoundError where no SAE has any."""
    from midiscover.conceptview import short_names
    from midiscover.features.modules import module_names
    from midiscover.ids import compared_settings, recorded_settings

    order = {name: place for place, name in enumerate(module_names())}
    rows = []
    for sae, called in short_names(saes).items():
        documents = [_document(storage, key) for key in storage.list(layout.sae_file(sae, "concepts"))]
        for document in sorted(documents, key=lambda d: (order.get(d["concept"], len(order)), d["concept"])):
            settings = document["of"]["sae"]
            shared = {
                "sae_id": sae,
                "label": called,
                "concept": document["concept"],
                "hook": document["of"]["hook"] or sae,
                "layer": document["of"]["layer"],
                **(compared_settings(recorded_settings(settings)) if settings else {"sparsity_label": "-"}),
            }
            rows += [
                shared | {key: row[key] for key in ("feature", "auroc", "passes")}
                for row in document["sae_scores"]["features"]
            ]
    if not rows:
        raise NotFoundError(f"No concept was judged for {saes[0]} yet; run `midiscover concepts {saes[0]}`.")
    return rows


def _document(storage: Storage, key: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read(key))
    except ValueError as error:
        raise CorruptError(f"{key} in {storage.uri} is not readable as JSON: {error}.") from None


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"figure": _figure}
