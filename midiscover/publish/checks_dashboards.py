"""Batches of SAEDashboard beside a Neuronpedia export, `dashboards/batch-N.json`: fields that its readers index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from midiscover.publish.checks import Failed, Skipped, Subject, check, expect, fail_for, parse_json
from midiscover.publish.checks_exports import place

KINDS = ("sae", "neuronpedia")
_BATCH = {"model_id": str, "layer": int, "sae_set": str, "sae_id_suffix": (str, type(None)), "features": list}
_LISTS = (
    ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    ("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    ("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    ("neg_str", "neg_values"),
    ("pos_str", "pos_values"),
    ("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    ("logits_hist_data_bar_values", "logits_hist_data_bar_heights"),
    ("decoder_weights_dist",),
    ("vector",),
    ("activations",),
)
"""Lists of a feature; those of a line are equally long."""
_FEATURE: dict[str, Any] = {
    "feature_index": int,
    "frac_nonzero": (int, float),
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
    **{name: list for names in _LISTS for name in names},
}
_ACTIVATION: dict[str, Any] = {
    "bin_min": (int, float, type(None)),
    "bin_max": (int, float, type(None)),
    "bin_contains": (int, float, type(None)),
    "tokens": list,
    "values": list,
    "qualifying_token_index": int,
}


def _batches(subject: Subject) -> list[tuple[str, dict[str, Any]]]:
    return subject.part("the dashboards", lambda: _read(subject))


def _read(subject: Subject) -> list[tuple[str, dict[str, Any]]]:
    folder = f"{place(subject, 'neuronpedia')}dashboards"
    names = [name for name in subject.names(folder) if name.rpartition("/")[2].startswith("batch-")]
    if not names:
        raise Skipped("there are no dashboards")
    names.sort(key=lambda name: int(name.rpartition("-")[2].removesuffix(".json")))
    return [(name.rpartition("/")[2], parse_json(name, subject.read(name))) for name in names]


@check("exports", KINDS)
def dashboards_can_be_read(subject: Subject) -> str:
    """Every dashboard batch is a JSON object of finite numbers."""
    return f"{len(subject.require('the dashboards', lambda: _read(subject)))} batches"


@check("exports", KINDS)
def dashboards_have_their_fields(subject: Subject) -> None:
    """Batches, features and activations have SAEDashboard's fields, no more and no fewer, each of its type."""
    fail_for([f"{name}: {problem}" for name, batch in _batches(subject) for problem in _problems(batch)])


@check("exports", KINDS)
def dashboards_have_each_feature(subject: Subject) -> str:
    """The dashboard batches have every feature once, in order."""
    features = [row for _, batch in _batches(subject) for row in batch.get("features") or ()]
    if not all(isinstance(row, dict) and isinstance(row.get("feature_index"), int) for row in features):
        raise Skipped("a feature has no feature_index")
    found = [row["feature_index"] for row in features]
    expect(found == list(range(len(found))), "feature_index does not count from 0")
    d_sae = len(found) if subject.kind != "sae" else subject.json("record.json").get("d_sae")
    expect(len(found) == d_sae, f"they have {len(found)} of {d_sae} features")
    return f"{len(found):,} features"


def _problems(batch: dict[str, Any]) -> Iterator[str]:
    yield from _fields(batch, _BATCH, "the batch")
    for feature in batch.get("features") or ():
        if not isinstance(feature, dict):
            raise Failed("a feature is no JSON object")
        here = f"feature {feature.get('feature_index')}"
        yield from _fields(feature, _FEATURE, here)
        for names in _LISTS:
            if len({len(feature.get(name) or ()) for name in names}) > 1:
                yield f"{here}: {' and '.join(names)} differ in length"
        for activation in feature.get("activations") or ():
            yield from _fields(activation, _ACTIVATION, here)
            tokens, values = activation.get("tokens") or [], activation.get("values") or []
            if len(tokens) != len(values) or not values:
                yield f"{here}: an activation has {len(tokens)} tokens and {len(values)} values"
            elif not 0 <= activation.get("qualifying_token_index", -1) < len(values):
                yield f"{here}: a qualifying_token_index is outside of its tokens"


def _fields(found: dict[str, Any], wanted: dict[str, Any], here: str) -> Iterator[str]:
    for name in found.keys() ^ wanted.keys():
        yield f"{here} has {'no' if name in wanted else 'an unknown'} {name}"
    for name, kind in wanted.items():
        if name in found and not isinstance(found[name], kind):
            yield f"{here}: {name} is {str(found[name])[:20]!r}"
