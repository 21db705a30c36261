"""A SAELens folder as other people load it: hook names of TransformerLens where it has the model, a card beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from midiscover.configio import to_yaml
from midiscover.hooknames import transformer_lens_hook
from midiscover.sae.registry import ARCHITECTURES
from midiscover.saeconfig import UNSTEPPED_CONTROLS
from midiscover.saes import CFG, SPARSITY, WEIGHTS
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.storage import Storage

CARD, SNIPPET = "README.md", "pretrained_saes.yaml"
SOMEWHERE = "your-organisation/your-repository"
"""Stands for a repository on the hub where none is known."""
_UNLICENSED = (
    "None is stated here: whoever publishes the SAE chooses it, within what the licences of the language model and of\n"
    "the text allow, and `--license` writes it into the head of this card"
)
_CONTROLS = {
    "neurons": "its features are the hook's own dimensions, each with either sign, and were not trained",
    "frozen_decoder": "its decoder rows are random directions that were not trained",
    "random_model": "the entries of each weight matrix of its language model are in random order",
    "untrained": "it is as it was initialised, before any training",
}
"""What a control is, in a sentence's second half."""
_METRICS = {
    "l0": "L0",
    "fvu": "FVU",
    "fvu_foreign": "FVU on a second, foreign text",
    "ce_recovered": "cross-entropy recovered",
    "dead_share": "dead features",
}


def saelens_files(
    storage: Storage,
    record: Mapping[str, Any],
    model_type: str | None,
    neuronpedia_id: str,
    repository: str | None = None,
    licence: str | None = None,
) -> dict[str, bytes]:
    """Name -> content. Weights and sparsity are the committed bytes; cfg.json, the card and the snippet are made.

    repository: `org/repo` of a hub where the SAE lies in a folder of its id. licence: see `PublishConfig.license`.
    """
    sae_id = record["id"]
    files = {WEIGHTS: storage.read(layout.sae_file(sae_id, WEIGHTS))}
    if storage.exists(layout.sae_file(sae_id, SPARSITY)):
        files[SPARSITY] = storage.read(layout.sae_file(sae_id, SPARSITY))
    cfg = json.loads(storage.read(layout.sae_file(sae_id, CFG)))
    cfg["metadata"] |= {"neuronpedia_id": neuronpedia_id} | saelens_hooks(cfg["metadata"], model_type)
    files[CFG] = dump(cfg)
    files[CARD] = card(record, cfg, repository, licence).encode()
    files[SNIPPET] = snippet(record, cfg, repository).encode()
    return files


@cache
def _transformer_lens_models() -> frozenset[str]:
    lines = Path(__file__).with_name("transformer_lens_models.txt").read_text().splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))


def saelens_hooks(metadata: Mapping[str, Any], model_type: str | None) -> dict[str, Any]:
    """Hook names of TransformerLens; none where it does not know the model, which SAELens then loads by transformers,
    or where one of the hooks has none there, since a model is loaded in one way. A revision is one of transformers.
    """
    if metadata["model_name"] not in _transformer_lens_models() or metadata.get("model_from_pretrained_kwargs"):
        return {}
    names = [name for name in ("hook_name", "hook_name_out") if metadata.get(name)]
    found = {name: transformer_lens_hook(metadata[name], model_type) for name in names}
    # At hook_z activations have a dimension of heads, which SAELens would take apart only if cfg.json asked for it.
    if any(name is None or name.endswith("hook_z") for name in found.values()):
        return {}
    return {**found, "model_class_name": "HookedTransformer"}


def snippet(record: Mapping[str, Any], cfg: Mapping[str, Any], repository: str | None) -> str:
    """The entry with which SAELens' own list of releases would know the SAE."""
    metrics = {"variance_explained": 1 - record["metrics"]["fvu"], "l0": record["metrics"]["l0"]}
    sae = {"id": record["id"], "path": record["id"], **{name: round(value, 4) for name, value in metrics.items()}}
    release = {
        "repo_id": repository or SOMEWHERE,
        "model": cfg["metadata"]["model_name"],
        "conversion_func": None,
        "saes": [sae | {"neuronpedia": cfg["metadata"]["neuronpedia_id"]}],
    }
    return to_yaml({(repository or SOMEWHERE).rpartition("/")[2]: release})


def card(record: Mapping[str, Any], cfg: Mapping[str, Any], repository: str | None, licence: str | None = None) -> str:
    """README.md of an SAE on a hub."""
    origin, metrics, metadata = record["lineage"], record["metrics"], cfg["metadata"]
    model, corpus = origin["model"], origin["corpus"]
    known = {title: metrics[name] for name, title in _METRICS.items() if metrics.get(name) is not None}
    table = "\n".join(f"| {title} | {value:.4g} |" for title, value in known.items())
    base = f"base_model: {metadata['model_name']}\n" if "/" in str(metadata["model_name"]) else ""
    settings = ", ".join(f"{name} {value}" for name, value in record["sae"].items() if value is not None)
    trained = f"settings: {settings}; seed {origin['seed']}"
    if record.get("imported"):
        trained = f"imported from {record['imported'].get('source')}; how it was trained is not known here"
    code = origin["code"]
    head = f"license: {licence}\n" if licence else ""
    made = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return f"""---
library_name: saelens
{head}{base}tags: [saelens, sparse-autoencoder, interpretability]
---

# {record["id"]}

{_introduction(record)} Inputs are raw activations of width {record["d_in"]:,}; decoder rows have norm 1.

| measured on held-out text | |
|---|---|
{table}

## Loading it

```python
from sae_lens import SAE

sae = SAE.load_from_disk("<this folder>")
sae = SAE.from_pretrained("{repository or SOMEWHERE}", "{record["id"]}")  # where it was pushed to a hub

from midiscover import load_sae

sae = load_sae("<this folder>")
```

{_places(record, metadata)} Where TransformerLens loads the model, it must not process its weights
(`from_pretrained_no_processing`), or its activations are not those that the SAE was made for.

## Where it comes from

- model: {model["name"]}, {_commit(model)}, activations in {model["dtype"]}
- text: {corpus["source"]}, {corpus["id"]}, revision {corpus["revision"]}
- {trained}
- made by: miDiscover {code["version"]} ({code["commit"] or "no commit"}), {made}, on {record["created"]}
- weights: sha256 `{record["files"][WEIGHTS]}`

## Licence

{f"`{licence}`" if licence else _UNLICENSED}.
"""


def _introduction(record: Mapping[str, Any]) -> str:
    """What the SAE is, in a sentence; in two where it is a control."""
    origin, control = record["lineage"], record["sae"].get("control", "none")
    model, hook = origin["model"]["name"], _place(record["hook"])
    if control == "random_model" or origin["model"].get("weights") == "shuffled":
        model += " with its weights shuffled"
    about = f"({record['kind']}, {record['d_sae']:,} features)"
    what = f"A sparse autoencoder {about} on {hook} of {model}"
    if _transcodes(record):
        what = f"A transcoder {about} that reads {hook} and predicts {_place(record['output_hook'])} of {model}"
    verb = "measured" if record.get("imported") or control in UNSTEPPED_CONTROLS else "trained"
    told = f"{what}, {verb} by miDiscover on {origin['corpus']['source']}."
    return f"{told} It is a control: {_CONTROLS[control]}." if control in _CONTROLS else told


def _places(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """What its hooks are called by those who load it."""
    told = f"It reads {_hook(record['hook'], metadata, 'hook_name')}."
    if _transcodes(record):
        told += f" It predicts {_hook(record['output_hook'], metadata, 'hook_name_out')}."
    return told


def _hook(hook: str, metadata: Mapping[str, Any], key: str) -> str:
    name = metadata[key]
    there = f"in SAELens `{name}` of `{metadata['model_class_name']}`"
    return f"{_place(hook)} in transformers, {'for which SAELens has no hook' if ':' in name else there}"


def _place(hook: str) -> str:
    """`model.layers.3.mlp:in` in words."""
    path, _, side = hook.partition(":")
    return f"the input of `{path}`" if side else f"`{path}`"


def _transcodes(record: Mapping[str, Any]) -> bool:
    return ARCHITECTURES[record["kind"]].transcodes


def _commit(model: Mapping[str, Any]) -> str:
    return f"commit {model['revision']}" if model.get("revision") else f"digest {model['digest'][:12]}"
