"""Neuronpedia's bulk layout: `v1/<model>/<source>/` with the rows of its database, from feature records.

Rows follow the importer's rules: every line of a file has the same keys, ids are given, numbers are finite, NUL is a
space, features carry no vector (that would make them custom ones), and names that other tables must know are left null.
What is compressed has no time in it, so that equal records give equal bytes.

Explanations are those of `midiscover explain`; of other features they say what can be said without a language model:
the tokens at a feature's peaks and those that it promotes. They name neither a method nor a model, since both would
have to be in the importer's tables; so nothing of `v1/config/`, which would add to those tables, is written.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from midiscover.config import NeuronpediaConfig
from midiscover.features.labels import label
from midiscover.features.records import Context, FeatureRecords
from midiscover.hooknames import transformer_lens_hook
from midiscover.publish.dashboard import Dashboards
from midiscover.publish.names import neuronpedia_names

BATCH = 1024
"""Features of a file."""
_DIGITS = 5
_LEVEL = 5

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What model.jsonl says of the language model besides its id."""

    name: str
    model_type: str | None
    layers: int
    d_model: int
    neurons_per_layer: int


class NeuronpediaExport:
    """The files of one SAE."""

    def __init__(
        self,
        record: Mapping[str, Any],
        cfg: Mapping[str, Any],
        model: ModelFacts,
        names: NeuronpediaConfig,
        repository: str | None = None,
    ) -> None:
        """repository: `org/repo` of a hub where the SAE lies in a folder of its id. UserError for names that
        Neuronpedia would not take."""
        self.repository = repository
        self.record, self.cfg, self.facts, self.names = record, cfg, model, names
        called = neuronpedia_names(record, model.name, names)
        self.model, self.set, self.source = called
        self.folder = called.folder
        # Of an unknown family it is not known what TransformerLens' hooks read.
        named = transformer_lens_hook(record["output_hook"], model.model_type) if model.model_type else None
        self.hook = named or record["output_hook"]
        self.created = record["created"][:19]

    def files(self, records: FeatureRecords) -> Iterator[tuple[str, bytes]]:
        """Names and contents, batch by batch."""
        for name, row in self.single(records).items():
            yield f"{self.folder}/{name}.jsonl", _lines([row])
        dashboards = Dashboards(self.model, self.record["layer"], self.set, self._source(records))
        for number, (features, contexts) in enumerate(records.batches(BATCH)):
            rows: dict[str, list[Row]] = {"features": [self.feature_row(feature) for feature in features]}
            rows["activations"] = [
                row for f in features for row in self.activation_rows(f["index"], contexts[f["index"]])
            ]
            rows["explanations"] = [self.explanation_row(feature) for feature in features if feature["count"]]
            for name, found in rows.items():
                if found:
                    data = gzip.compress(_lines(found), _LEVEL, mtime=0)
                    yield f"{self.folder}/{name}/batch-{number}.jsonl.gz", data
            yield from dashboards.batches(number * BATCH, rows["features"], rows["activations"])
        yield from dashboards.settings()

    def single(self, records: FeatureRecords) -> dict[str, Row]:
        """The rows that a source has one of each: `release`, `model`, `sourceset`, `source`."""
        return {
            "release": self._release(),
            "model": self._model(),
            "sourceset": self._sourceset(),
            "source": self._source(records),
        }

    def _release(self) -> Row:
        names = self.names
        return {
            "name": names.release,
            "description": f"SAEs trained by miDiscover on {self.facts.name}",
            "descriptionShort": names.release,
            "creatorName": names.creator_name,
            "creatorNameShort": names.creator_name,
            "creatorId": names.creator_id,
            "creatorEmail": None,
            "urls": [names.url] if names.url else [],
            "visibility": "PUBLIC",
            "isNewUi": False,
            "featured": False,
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "defaultUmapSourceIds": [],
            "createdAt": self.created,
        }

    def _model(self) -> Row:
        name, facts = self.facts.name, self.facts
        return {
            "id": self.model,
            "displayName": name.rpartition("/")[2],
            "displayNameShort": name.rpartition("/")[2],
            "creatorId": self.names.creator_id,
            "tlensId": name,
            "dimension": facts.d_model,
            "visibility": "PUBLIC",
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "inferenceEnabled": False,
            "instruct": "instruct" in name.lower(),
            "layers": facts.layers,
            "neuronsPerLayer": facts.neurons_per_layer,
            "owner": name.partition("/")[0] if "/" in name else self.names.creator_name,
            "website": f"https://huggingface.co/{name}" if "/" in name else None,
            "createdAt": self.created,
            "updatedAt": self.created,
        }

    def _sourceset(self) -> Row:
        names = self.names
        return {
            "modelId": self.model,
            "name": self.set,
            "creatorId": names.creator_id,
            "hasDashboards": True,
            "visibility": "PUBLIC",
            "description": f"{self.record['kind']}, {self.record['d_sae']:,} features",
            "type": "",
            "creatorName": names.creator_name,
            "urls": [names.url] if names.url else [],
            "creatorEmail": None,
            "releaseName": names.release,
            "defaultOfModelId": None,
            "defaultRange": 1,
            "defaultShowBreaks": True,
            "showDfa": False,
            "showCorrelated": False,
            "showHeadAttribution": False,
            "showUmap": False,
            "createdAt": self.created,
        }

    def _source(self, records: FeatureRecords) -> Row:
        context = self.cfg["metadata"].get("context_size")
        told = {name: value for name, value in self.cfg.items() if name != "metadata"}
        told |= {"hook_name": self.hook, "hook_layer": self.record["layer"], "context_size": context}
        return {
            "id": self.source,
            "modelId": self.model,
            "setName": self.set,
            "creatorId": self.names.creator_id,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "inferenceHosts": [],
            "saelensConfig": told,
            "saelensRelease": None,
            "saelensSaeId": None,
            "hfRepoId": self.repository,
            "hfFolderId": self.record["id"] if self.repository else None,
            "visibility": "PUBLIC",
            "defaultOfModelId": None,
            "hasUmap": False,
            "hasUmapLogSparsity": False,
            "hasUmapClusters": False,
            "num_prompts": records.manifest["rows"] // context if context else None,
            "num_tokens_in_prompt": context,
            "dataset": self.record["lineage"]["corpus"]["source"],
            "notes": None,
            "createdAt": self.created,
        }

    def feature_row(self, feature: Mapping[str, Any]) -> Row:
        """A feature as a row of Neuronpedia's table `Neuron`."""
        return {
            "modelId": self.model,
            "layer": self.source,
            "index": str(feature["index"]),
            "sourceSetName": self.set,
            "creatorId": self.names.creator_id,
            "createdAt": self.created,
            "maxActApprox": _number(feature["max"]),
            "hasVector": False,
            "vector": [],
            "vectorLabel": None,
            "vectorDefaultSteerStrength": _number(feature["max"]),
            "hookName": self.hook,
            "topkCosSimIndices": feature["neighbour_index"],
            "topkCosSimValues": _numbers(feature["neighbour_cosine"]),
            "neuron_alignment_indices": feature["neuron_index"],
            "neuron_alignment_values": _numbers(feature["neuron_value"]),
            "neuron_alignment_l1": _numbers(feature["neuron_l1"]),
            "correlated_neurons_indices": feature["input_index"],
            "correlated_neurons_pearson": _numbers(feature["input_pearson"]),
            "correlated_neurons_l1": _numbers(feature["input_cosine"]),  # what SAEDashboard puts there
            "correlated_features_indices": feature["coactive_index"],
            "correlated_features_pearson": _numbers(feature["coactive_pearson"]),
            "correlated_features_l1": _numbers(feature["coactive_cosine"]),
            "neg_str": _texts(feature["neg_tokens"]),
            "neg_values": _numbers(feature["neg_values"]),
            "pos_str": _texts(feature["pos_tokens"]),
            "pos_values": _numbers(feature["pos_values"]),
            "frac_nonzero": _number(feature["firing_rate"], 8),
            "freq_hist_data_bar_heights": feature["hist_heights"],
            "freq_hist_data_bar_values": _numbers(feature["hist_values"]),
            "logits_hist_data_bar_heights": feature["logit_hist_heights"],
            "logits_hist_data_bar_values": _numbers(feature["logit_hist_values"]),
            "decoder_weights_dist": [],
        }

    def activation_rows(self, index: int, contexts: Sequence[Context]) -> Iterator[Row]:
        """Its contexts as rows of the table `Activation`; those drawn at random left out."""
        for context in contexts:
            if context.kind == "random":
                continue
            yield {
                "id": self._id("activation", index, context.kind, context.rank),
                "modelId": self.model,
                "layer": self.source,
                "index": str(index),
                "creatorId": self.names.creator_id,
                "tokens": _texts(context.tokens),
                "values": _numbers(context.values),
                "maxValue": _number(max(context.values)),
                "maxValueTokenIndex": context.values.index(max(context.values)),
                "minValue": _number(min(context.values)),
                "binMin": _number(context.bin_min or 0),
                "binMax": _number(context.bin_max or 0),
                "binContains": _number(context.bin_share or 0, 8),
                "qualifyingTokenIndex": context.peak,
                "dataSource": None,
                "dataIndex": None,
                "dfaValues": [],
                "dfaTargetIndex": None,
                "dfaMaxValue": None,
                "lossValues": [],
                "logitContributions": None,
                "createdAt": self.created,
            }

    def explanation_row(self, feature: Mapping[str, Any]) -> Row:
        """Its label as a row of the table `Explanation`."""
        return {
            "id": self._id("explanation", feature["index"]),
            "modelId": self.model,
            "layer": self.source,
            "index": str(feature["index"]),
            "authorId": self.names.creator_id,
            "description": label(feature),
            "typeName": None,
            "explanationModelName": None,
            "notes": None,
            "createdAt": self.created,
        }

    def _id(self, *parts: Any) -> str:
        """25 characters that look like a cuid and are the same each time."""
        text = "/".join(map(str, (self.model, self.source, self.record["id"], *parts)))
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def _number(value: float, digits: int = _DIGITS) -> float:
    return round(float(value), digits) if math.isfinite(value) else 0.0


def _numbers(values: Sequence[float]) -> list[float]:
    return [_number(value) for value in values]


def _texts(tokens: Sequence[str]) -> list[str]:
    """NUL, which the importer would replace, is a space; half a surrogate pair is the replacement character."""
    return [token.replace("\0", " ").encode(errors="replace").decode() for token in tokens]
