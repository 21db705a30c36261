"""A SAELens folder as other people load it: hook names of TransformerLens where it has them, a model card beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from midiscover.publish.names import transformer_lens_hook
from midiscover.saes import CFG, SPARSITY, WEIGHTS, dump
from midiscover.store import layout
from midiscover.store.storage import Storage

_METRICS = {
    "l0": "L0",
    "fvu": "FVU",
    "fvu_foreign": "FVU on a second, foreign text",
    "ce_recovered": "cross-entropy recovered",
    "dead_share": "dead features",
}


def saelens_files(
    storage: Storage, record: Mapping[str, Any], model_type: str | None, neuronpedia_id: str | None
) -> dict[str, bytes]:
    """Name -> content. Weights and sparsity are the committed bytes; cfg.json and the card are made."""
    sae_id = record["id"]
    files = {name: storage.read(layout.sae_file(sae_id, name)) for name in (WEIGHTS, SPARSITY)}
    cfg = json.loads(storage.read(layout.sae_file(sae_id, CFG)))
    cfg["metadata"] |= {"neuronpedia_id": neuronpedia_id} | _hooks(cfg["metadata"], model_type)
    files[CFG] = dump(cfg)
    files["README.md"] = card(record, cfg).encode()
    return files


def _hooks(metadata: Mapping[str, Any], model_type: str | None) -> dict[str, Any]:
    """Hook names of TransformerLens; none where one of the hooks has none, since a model is loaded in one way."""
    names = [name for name in ("hook_name", "hook_name_out") if metadata.get(name)]
    found = {name: transformer_lens_hook(metadata[name], model_type) for name in names}
    if None in found.values():
        return {}
    return {**found, "model_class_name": "HookedTransformer"}


def card(record: Mapping[str, Any], cfg: Mapping[str, Any]) -> str:
    """README.md of a model on a hub."""
    model, metrics = record["lineage"]["model"]["name"], record["metrics"]
    known = {title: metrics[name] for name, title in _METRICS.items() if metrics.get(name) is not None}
    table = "\n".join(f"| {title} | {value:.4g} |" for title, value in known.items())
    revision = record["lineage"]["model"]["revision"] or record["lineage"]["model"]["digest"][:12]
    corpus = record["lineage"]["corpus"]["source"]
    return f"""---
library_name: saelens
tags: [sparse-autoencoder, interpretability]
---

# {record["id"]}

A sparse autoencoder ({record["kind"]}, {record["d_sae"]:,} features) on `{record["hook"]}` of {model} ({revision}),
trained by miDiscover on {corpus}. Inputs are raw activations of width {record["d_in"]:,}; decoder rows have norm 1.

| measured on held-out text | |
|---|---|
{table}

In SAELens: `SAE.load_from_disk("<this folder>")`. In miDiscover: `load_sae("<this folder>")`.

In SAELens the hook is `{cfg["metadata"]["hook_name"]}` of `{cfg["metadata"]["model_class_name"]}`; in transformers the
module `{record["hook"]}`. TransformerLens must load the model without processing its weights
(`from_pretrained_no_processing`), or its activations are not those that the SAE was trained on.
"""
