"""The same features as SAEDashboard writes them: `dashboards/batch-N.json`, for tools that read its output.

Rows are those of the Neuronpedia export under SAEDashboard's names, so that the two can't differ. Of its other outputs
`run_settings.json` holds what we have of its settings, and `skipped_indexes.json` says that no feature was left out;
the tokens, a torch file, are not written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from midiscover.store.documents import dump

BATCH = 128
"""Features of a file; `neuronpedia.BATCH` is a multiple."""
FOLDER = "dashboards"

Row = Mapping[str, Any]

_ALIKE = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)
"""Fields of a feature that have one name in both layouts."""
_ACTIVATION = {
    "bin_min": "binMin",
    "bin_max": "binMax",
    "bin_contains": "binContains",
    "tokens": "tokens",
    "values": "values",
    "qualifying_token_index": "qualifyingTokenIndex",
}
"""Fields of an activation: SAEDashboard's name and Neuronpedia's."""


class Dashboards:
    """The files of one SAE."""

    def __init__(self, model: str, layer: int | None, source_set: str, source: Row) -> None:
        """source: the row of source.jsonl."""
        self.model, self.layer, self.set = model, layer if layer is not None else 0, source_set
        self._prompts = {
            "n_prompts_total": source["num_prompts"] or 0,
            "n_tokens_in_prompt": source["num_tokens_in_prompt"] or 0,
            "dataset": source["dataset"],
        }

    def batches(self, first: int, features: Sequence[Row], activations: Sequence[Row]) -> Iterator[tuple[str, bytes]]:
        """Names and contents for some rows of features.jsonl, in order from the feature `first`, and the rows of
        activations.jsonl that belong to them."""
        found: dict[str, list[Row]] = {feature["index"]: [] for feature in features}
        for activation in activations:
            found[activation["index"]].append(activation)
        for start in range(0, len(features), BATCH):
            batch = {
                "model_id": self.model,
                "layer": self.layer,
                "sae_set": self.set,
                "sae_id_suffix": None,
                "features": [self._feature(row, found[row["index"]]) for row in features[start : start + BATCH]],
            }
            yield f"{FOLDER}/batch-{(first + start) // BATCH}.json", _json(batch)

    def settings(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of what says how the batches were made."""
        settings = {
            "sae_set": self.set,
            "model_id": self.model,
            "layer": self.layer,
            "n_prompts_total": self._prompts["n_prompts_total"],
            "n_tokens_in_prompt": self._prompts["n_tokens_in_prompt"],
            "n_features_at_a_time": BATCH,
            "huggingface_dataset_path": self._prompts["dataset"],
        }
        skipped = {
            "model_id": self.model,
            "layer": str(self.layer),
            "sae_set": self.set,
            "log_sparsity": None,
            "skipped_indexes": [],
        }
        yield f"{FOLDER}/run_settings.json", dump(settings)
        yield f"{FOLDER}/skipped_indexes.json", dump(skipped)

    def _feature(self, row: Row, activations: Sequence[Row]) -> dict[str, Any]:
        contexts = [{name: found[theirs] for name, theirs in _ACTIVATION.items()} for found in activations]
        return {
            "feature_index": int(row["index"]),
            **{name: row[name] for name in _ALIKE},
            **self._prompts,
            "activations": contexts,
        }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
