"""Content ids: a stage's id is a hash of everything that changes its numbers, and of nothing else.

Each function lists by hand what counts. A version `v` is raised when the code's meaning changes, so that a result
computed by a fixed bug is never found again; a new setting at its old meaning is left out, so that old ids stand.
Never counted: packs, devices, threads, stores, paths, names, report and checkpoint intervals.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from midiscover.config import CorpusConfig, EvaluateConfig, HarvestConfig, ModelConfig, SaeConfig, SaePoint

HASH_LENGTH = 10


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces. TypeError for anything without a stable form; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def fingerprint(stage: str, version: int, fields: Mapping[str, Any]) -> str:
    """Ten hex digits of the sha256 of a stage's name, version and fields."""
    text = canonical_json({"stage": stage, "v": version, **fields})
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def _settings(config: Any) -> dict[str, Any]:
    """A dataclass as plain data; a whole number where a field is a float counts as that float."""
    values = asdict(config)
    for item in fields(config):
        if item.type == "float" and values[item.name] is not None:
            values[item.name] = float(values[item.name])
    return values


def corpus_id(corpus: CorpusConfig, *, source_digest: str, tokenizer_digest: str) -> str:
    """Id of token windows: the text, the tokenizer, and how the text was cut, split and mixed."""
    names = ("text_field", "max_samples", "max_tokens", "context_size", "held_out", "prepend_bos", "seed")
    given: dict[str, Any] = {name: getattr(corpus, name) for name in names}
    if corpus.subset is not None or corpus.split != "train":
        given |= {"subset": corpus.subset, "split": corpus.split}
    return "c." + fingerprint("corpus", 1, given | {"source": source_digest, "tokenizer": tokenizer_digest})


def harvest_id(model: ModelConfig, harvest: HarvestConfig, *, model_digest: str, corpus: str) -> str:
    """Id of activation blocks. Hooks are not in it: a further hook of the same model and text harvests only itself."""
    given = {
        "model": model_digest,
        "dtype": model.dtype,
        "attention": model.attention,
        "corpus": corpus,
        "block_tokens": harvest.block_tokens,
        "mask_first": harvest.mask_first,
        "outlier_norm": harvest.outlier_norm,
    }
    return "h." + fingerprint("harvest", 1, given)


def hook_layer(hook: str) -> int | None:
    """The layer of a module path: its first part that is a whole number (`model.layers.16.mlp.fc2` is 16)."""
    return next((int(part) for part in hook.partition(":")[0].split(".") if part.isdigit()), None)


def hook_label(hook: str) -> str:
    """`model.layers.16.mlp.fc2` as `l16.mlp-fc2`; a path without a layer keeps all its parts."""
    path, _, side = hook.partition(":")
    parts = path.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    tail = parts if layer is None else parts[layer + 1 :]
    name = "-".join([*tail, *([side] if side else [])]) or "block"
    name = re.sub(r"[^a-z0-9_-]+", "-", name.lower())
    return name if layer is None else f"l{parts[layer]}.{name}"


def sparsity_label(sae: SaeConfig) -> str:
    """What sets the sparsity, for people: `l1 3` or `k 32`."""
    return f"l1 {sae.l1_coefficient:g}" if sae.kind == "standard" else f"k {sae.k}"


def sae_id(point: SaePoint, *, harvest: str, d_in: int) -> str:
    """`l16.mlp-fc2.standard-20480.l1-3.<hash>`, known before training."""
    skip = {"expansion_factor", "d_sae"}
    settings = {k: v for k, v in _settings(point.sae).items() if k not in skip and v is not None}
    d_sae = point.sae.width(d_in)
    train = {k: v for k, v in _settings(point.train).items() if k not in ("report_every", "checkpoint_every")}
    given = {"harvest": harvest, "hook": point.hook, "d_sae": d_sae, "sae": settings, "train": train}
    sparsity = sparsity_label(point.sae).replace(" ", "-")
    return f"{hook_label(point.hook)}.{point.sae.kind}-{d_sae}.{sparsity}.{fingerprint('sae', 1, given)}"


def evaluation_id(evaluate: EvaluateConfig) -> str:
    """Id of how an SAE is measured; a change measures anew and trains nothing."""
    return "e." + fingerprint("evaluation", 1, _settings(evaluate))


def sweep_id(name: str, sae_ids: Sequence[str], evaluation: str) -> str:
    """`demo.<hash>` over the SAEs of the grid and how they are measured."""
    return f"{name}." + fingerprint("sweep", 1, {"saes": sorted(sae_ids), "evaluation": evaluation})


def pack_id(sae_ids: Sequence[str]) -> str:
    """Names a pack's checkpoints; another composition starts anew."""
    return "p." + fingerprint("pack", 1, {"saes": sorted(sae_ids)})
