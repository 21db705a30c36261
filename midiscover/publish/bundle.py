"""The bundle: one folder that tells all of an SAE, in the files and under the names of the first miDiscover.

sae_model.pt               {"state_dict", "model_state_dict", "config"}; `torch.load(path, weights_only=True)` reads it
feature_analysis.json      every feature: how often and how strongly it fires, tokens, neighbours, texts, direction
top_100_features.json      100 of them, ranked as the README says
neuronpedia_metadata.json  what the SAE, its model and its hook are called on Neuronpedia, and how it was trained
decoder_weights.npy        the decoder [d_out, d_sae], float32
visualizations/*.png       density, dead, norms, top_features, and the frontier of its sweep
cfg.json sae_weights.safetensors sparsity.safetensors record.json
                           the folder of the store, so that the bundle can be loaded and checked by itself
README.md                  which file is what

`mean_activation` is the mean over all tokens, `mean` the one over the tokens on which a feature fires.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from midiscover import figures
from midiscover.features.records import Context, FeatureRecords
from midiscover.publish.neuronpedia import NeuronpediaExport
from midiscover.saes import CFG, SPARSITY, WEIGHTS
from midiscover.store import layout
from midiscover.store.documents import dump, read_json
from midiscover.store.storage import Storage
from midiscover.summary import Row, fixed, percent

MODEL, ANALYSIS, TOP, METADATA = (
    "sae_model.pt",
    "feature_analysis.json",
    "top_100_features.json",
    "neuronpedia_metadata.json",
)
DECODER, README, RECORD, PICTURES = "decoder_weights.npy", "README.md", "record.json", "visualizations"
TOP_FEATURES = 100
LEAST_FIRINGS, MOST_FREQUENT = 10, 0.01
"""Fewer firings show nothing; a feature with a higher firing rate is seldom about one thing."""
TEXTS = 5
"""Texts of a feature in feature_analysis.json at most."""
CARDS = 4
RANKED_BY = (
    f"mean activation where it fires: first the features that fire at least {LEAST_FIRINGS} times and on at most "
    f"{MOST_FREQUENT:.0%} of the tokens, then the others that fire"
)
ACTIVE = 0.001
"""Firing rate above which a feature counts in `active_features`."""
_ALIKE = (
    *("count", "firing_rate", "mean", "std", "quantiles", "top_tokens", "pos_tokens", "pos_values"),
    *("neg_tokens", "neg_values", "neighbour_index", "neighbour_cosine"),
)
"""Columns of the feature records that keep their names."""


class Bundle:
    """The files of one SAE."""

    def __init__(
        self,
        storage: Storage,
        record: Mapping[str, Any],
        records: FeatureRecords,
        neuronpedia: NeuronpediaExport,
        decode: Callable[[list[int]], str],
        sweep_rows: Sequence[Row] = (),
    ) -> None:
        """decode: token ids to their text. sweep_rows: the SAEs of its sweep, for the frontier; see
        `choice.sweep_rows`.
        """
        self.storage, self.record, self.records, self.decode = storage, record, records, decode
        self.neuronpedia, self.sweep_rows = neuronpedia, sweep_rows

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents."""
        stored = {name: self._stored(name) for name in (CFG, WEIGHTS, RECORD)}
        weights = dict(sorted(load(stored[WEIGHTS]).items()))  # safetensors gives them in any order
        cfg = json.loads(stored[CFG])
        yield from stored.items()
        if self.storage.exists(layout.sae_file(self.record["id"], SPARSITY)):
            yield SPARSITY, self._stored(SPARSITY)
        yield MODEL, self._model(weights, cfg)
        yield DECODER, _array(weights["W_dec"].T)
        features = list(self._features())
        yield METADATA, dump(self._metadata(features))
        yield ANALYSIS, self._analysis(features, weights["W_dec"])
        ranked = top_features(features)
        yield TOP, _lines("[\n", ranked, weights["W_dec"], "]\n")
        best = [row["feature_idx"] for row in ranked[:CARDS]]
        for name, chart in self._charts(weights, best).items():
            yield f"{PICTURES}/{name}.png", figures.png(chart)
        yield README, self._readme().encode()

    def _stored(self, name: str) -> bytes:
        return self.storage.read(layout.sae_file(self.record["id"], name))

    def _facts(self) -> dict[str, Any]:
        """What several files begin with."""
        record = self.record
        return {
            "model_name": record["lineage"]["model"]["name"],
            "layer_name": record["hook"],
            "d_model": record["d_in"],
            "d_hidden": record["d_sae"],
        }

    def _model(self, weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> bytes:
        """The one file that torch.save writes; plain tensors and JSON values, so that `weights_only` reads them.

        `model_state_dict` shares its memory with `state_dict`, in the file too.
        """
        file = io.BytesIO()
        parts = {"state_dict": dict(weights), "model_state_dict": _linear_layers(weights, cfg)}
        torch.save({**parts, "config": {**cfg, **self._facts()}}, file)
        return file.getvalue()

    def _features(self) -> Iterator[dict[str, Any]]:
        """The rows of feature_analysis.json, but for `decoder_weights`."""
        for features, contexts in self.records.batches():
            for row in features:
                top = [context for context in contexts[row["index"]] if context.kind == "top"]
                yield {
                    "feature_idx": row["index"],
                    "max_activation": row["max"],
                    "mean_activation": row["mean"] * row["firing_rate"],
                    "activation_frequency": row["firing_rate"],
                    "top_activations": [context.value for context in top],
                    **{name: row[name] for name in _ALIKE},
                    "texts": [self._text(context) for context in top[:TEXTS]],
                }

    def _text(self, context: Context) -> dict[str, Any]:
        return {
            "text": self.decode(context.token_ids),  # of a whole: a character may lie in several tokens
            "token": context.tokens[context.peak],
            "value": context.value,
            "document": context.document,
        }

    def _analysis(self, features: Sequence[Mapping[str, Any]], decoder: Tensor) -> bytes:
        manifest = self.records.manifest
        about = self._facts() | {"sae": self.record["id"], "tokens": manifest["tokens"], "ranking_of_top": RANKED_BY}
        head = json.dumps(about, ensure_ascii=False, allow_nan=False)[:-1]
        return _lines(f'{head}, "features": [\n', features, decoder, "]}\n")

    def _metadata(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        record, names = self.record, self.neuronpedia
        training = read_json(self.storage, layout.training(record["id"])) or {}
        return {
            "model_name": names.facts.name,
            "layer": record["hook"],
            "d_model": record["d_in"],
            "d_sae": record["d_sae"],
            "l1_coefficient": record["sae"].get("l1_coefficient"),
            "learning_rate": training.get("lr"),
            "num_epochs": (record["train"] or {}).get("epochs"),
            "created_at": record["created"],
            "num_features": len(features),
            "active_features": sum(row["activation_frequency"] > ACTIVE for row in features),
            "modelId": names.model,
            "sourceId": names.source,
            "sourceSetName": names.set,
            "hookName": names.hook,
            **names.single(self.records),
        }

    def _charts(self, weights: Mapping[str, Tensor], best: Sequence[int]) -> dict[str, figures.Chart]:
        rates = [{"value": rate} for rate in self.records.table(["firing_rate"])["firing_rate"].to_pylist()]
        dead = figures.dead_chart(rates, subtitle=[self.records.source])
        charts = {"density": self._density(), "dead": dead, "norms": _norms(weights)}
        if len(self.sweep_rows) > 1:
            charts["frontier"] = figures.frontier_chart(self.sweep_rows)
        if best:
            cards = [figures.Card(self.records.feature(index), self.records.contexts(index)) for index in best]
            charts["top_features"] = figures.feature_cards(cards)
        return charts

    def _density(self) -> figures.Chart:
        counts = self.records.table(["count"])["count"].to_pylist()
        tokens = self.records.manifest["tokens"]
        rows = [{"value": float(np.log10(count / tokens))} for count in counts if count]
        told = (
            f"{fixed(tokens, 0)} training tokens; features that never fire there: {fixed(len(counts) - len(rows), 0)}"
        )
        return figures.histogram_chart(rows, "How often features fire", "log10 firing rate", subtitle=[told])

    def _readme(self) -> str:
        record, metrics = self.record, self.record["metrics"]
        measured = (
            f"L0 {fixed(metrics['l0'], 1)}, FVU {fixed(metrics['fvu'], 3)}, dead {percent(metrics['dead_share'])}"
        )
        _, files, words = (__doc__ or "").strip().split("\n\n")
        return (
            f"# {record['id']}\n\n"
            f"A sparse autoencoder ({record['kind']}, {record['d_sae']:,} features) on `{record['hook']}` of "
            f"{record['lineage']['model']['name']}, made by miDiscover. On held-out text: {measured}.\n\n"
            f"```\n{files}\nmanifest.json              sha256 and size of each file; written last\n```\n\n{words}\n\n"
            f"{TOP} is ranked by {RANKED_BY}. Texts are the places where a feature is strongest, one per window of the "
            "corpus.\n"
        )


def top_features(features: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of top_100_features.json, highest first, each with its `rank` from 1."""

    def order(row: dict[str, Any]) -> tuple[bool, float, int]:
        unusual = row["count"] < LEAST_FIRINGS or row["firing_rate"] > MOST_FREQUENT
        return unusual, -row["mean"], row["feature_idx"]

    ranked = sorted((row for row in features if row["count"]), key=order)[:TOP_FEATURES]
    return [{"rank": rank, **row} for rank, row in enumerate(ranked, 1)]


def _linear_layers(weights: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights as the first miDiscover names them, f = relu(W x + b); those of other architectures as they are."""
    if cfg["architecture"] != "standard":
        return dict(weights)
    return {
        "encoder.weight": weights["W_enc"].T,
        "encoder.bias": weights["b_enc"] - weights["b_dec"] @ weights["W_enc"],
        "decoder.weight": weights["W_dec"].T,
        "decoder.bias": weights["b_dec"],
    }


def _array(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(tensor.to(torch.float32).numpy()), allow_pickle=False)
    return file.getvalue()


def _lines(head: str, features: Sequence[Mapping[str, Any]], decoder: Tensor, tail: str) -> bytes:
    """Features with their directions, one a line, so that a person can page through them and a search finds one.

    Most of such a file are directions: 500 MB at 20,480 features of width 2,560. Half a surrogate pair, which
    UTF-8 can't hold, is a question mark.
    """
    file = io.BytesIO()
    file.write(head.encode())
    for place, row in enumerate(features):
        direction = decoder[row["feature_idx"]]
        told = _rounded({**row, "decoder_norm": float(direction.norm())})
        told["decoder_weights"] = six_digits(direction.numpy()).tolist()
        text = json.dumps(told, ensure_ascii=False, allow_nan=False)
        file.write(((",\n" if place else "") + text).encode(errors="replace"))
    file.write(f"\n{tail}".encode())
    return file.getvalue()


def six_digits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The float64 nearest to each value's first six digits, whose shortest decimal is those digits."""
    values = values.astype(np.float64)
    places = 5 - np.floor(np.log10(np.abs(values), where=values != 0, out=np.zeros_like(values)))
    scale = 10.0 ** np.clip(np.abs(places), 0, 22)  # powers that float64 holds exactly
    return np.where(places >= 0, np.rint(values * scale) / scale, np.rint(values / scale) * scale)


def _rounded(value: Any) -> Any:
    """Numbers in six digits; float32 has seven."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def _norms(weights: Mapping[str, Tensor]) -> figures.Chart:
    decoder, encoder = weights["W_dec"].norm(dim=1), weights["W_enc"].norm(dim=0)
    low, high = float(decoder.min()), float(decoder.max())
    told = f"Norms of the decoder rows: {low:.6f} to {high:.6f}"
    rows = [{"value": value} for value in encoder.tolist()]
    return figures.histogram_chart(rows, "Norms of the encoder's directions", "Norm of a column", subtitle=[told])
