"""Content ids: a stage's id is a hash of everything that changes its numbers, and of nothing else.

Each function lists by hand what counts. A version `v` is raised when the code's meaning changes, so that a result
computed by a fixed bug is never found again; a new setting at its old meaning is left out, so that old ids stand.
Never counted: packs, devices, threads, stores, paths, names, report and checkpoint intervals.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from midiscover.config import (
    CorpusConfig,
    EvaluateConfig,
    FeaturesConfig,
    HarvestConfig,
    ModelConfig,
    SaePoint,
    TrainConfig,
)
from midiscover.saeconfig import SAE_KINDS, UNSTEPPED_CONTROLS, L1Config, PenaltyConfig, SaeConfig, TopKConfig

HASH_LENGTH = 10
LATER_SETTINGS: dict[str, Any] = {
    "control": "none",
    "decoder": "free",
    "resample_at": (),
    "foreign_source": None,
    "foreign_text_field": None,
    "foreign_subset": None,
    "foreign_split": "train",
}
"""Settings that came after the first ids, at the meaning that those ids have: there they are left out."""
RECIPE_VERSION = 1
"""Of `sae.schedule.peak_lr`: counts where the learning rate is left to it."""
STEERING_VERSION = 3
"""Of `sae.l0control`: counts where L0 is asked for instead of a coefficient."""
RESAMPLING_VERSIONS = {"jumprelu": 2}
"""Of kinds whose resampled features begin otherwise than at first: counts where `train.resample_at` asks for some."""
UNCOUNTED = ("report_every", "checkpoint_every", "retire_after")
"""Settings in `train` that change no SAE that is made."""
TOLD_APART = ("kind", "control", "expansion_factor", "d_sae", "output_hook", "seed")
"""Settings in `sae` and `train` that tables and charts have names for, besides what sets the sparsity."""
TRAINING_VERSIONS = {"topk": 3, "batchtopk": 3, "matryoshka_batchtopk": 3}
"""Of kinds whose training changed its meaning since the first: how they begin, and the weight of AuxK."""


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
        if str(item.type).startswith("float") and values[item.name] is not None:
            values[item.name] = float(values[item.name])
    return {name: value for name, value in values.items() if LATER_SETTINGS.get(name, _ABSENT) != value}


_ABSENT = object()


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
    if model.weights != "trained":
        given["weights"] = model.weights
    return "h." + fingerprint("harvest", 1, given)


def features_id(features: FeaturesConfig) -> str:
    """Id of the feature records of an SAE, within the SAE's folder."""
    return "f." + fingerprint("features", 2, _settings(features))


def hook_layer(hook: str) -> int | None:
    """The layer of a module path: its first part that is a whole number (`model.layers.16.mlp.fc2` is 16)."""
    block = hook_block(hook)
    return None if block is None else block[1]


def hook_block(hook: str) -> tuple[str, int] | None:
    """Where the list of layers is, and the layer's number in it: `model.layers`, 15; None outside of layers."""
    parts = hook.partition(":")[0].split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def first_block(hooks: Iterable[str]) -> tuple[str, int] | None:
    """The first of the layers that some hooks lie in; None where one lies in none, or they in two lists of layers."""
    blocks = [hook_block(hook) for hook in hooks]
    inside = [block for block in blocks if block is not None]
    one_list = len(inside) == len(blocks) and len({path for path, _ in inside}) == 1
    return min(inside) if one_list else None


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
    """What sets the sparsity, for people: `l1 3`, `k 32` or, for one that is steered there, `L0 60`."""
    name, value = sae.sparsity()
    return f"{name} {value:g}"


def compared_settings(sae: SaeConfig) -> dict[str, Any]:
    """What SAEs of a sweep are compared by: `control, sparsity_label, l1, k, target_l0`; None where one has no such."""
    target = sae.target_l0 if isinstance(sae, PenaltyConfig) else None
    return {
        "control": sae.control,
        "sparsity_label": sparsity_label(sae),
        "l1": sae.l1_coefficient if isinstance(sae, L1Config) and target is None else None,
        "k": sae.k if isinstance(sae, TopKConfig) else None,
        "target_l0": target,
    }


def variants(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each SAE has of the settings that tell SAEs of a sweep apart where `compared_settings`, hooks and width do
    not: `decoder free, lr 0.001`. Of an architecture in which no two differ so, `""`.

    records: `hook, output_hook, d_sae, sae, train` of each, as in its record.json.
    """
    found = [_other_settings(record) for record in records]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record, other in zip(records, found, strict=True):
        if other:
            sae = recorded_settings(record["sae"])
            place = (record.get("hook"), record.get("output_hook"), record.get("d_sae"))
            groups.setdefault((sae.kind, sae.control, sparsity_label(sae), *place), []).append(other)
    differ: dict[str, set[str]] = {}
    for (kind, *_), members in groups.items():
        for name in {name: None for member in members for name in member}:
            if len({canonical_json(member.get(name)) for member in members}) > 1:
                differ.setdefault(kind, set()).add(name)
    named = [
        differ.get(record["sae"]["kind"], set()) if other else () for record, other in zip(records, found, strict=True)
    ]
    return [
        ", ".join(f"{name} {_value(value)}" for name, value in other.items() if name in names)
        for names, other in zip(named, found, strict=True)
    ]


def _other_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that have no name of their own in tables and charts; of a control that takes no step, none of steps."""
    sae = record.get("sae") or {}
    train = {} if sae.get("control") in UNSTEPPED_CONTROLS else record.get("train") or {}
    settings = _whole(SAE_KINDS[sae["kind"]], sae) | _whole(TrainConfig, train) if sae else {}
    return {name: value for name, value in settings.items() if name not in (*TOLD_APART, *UNCOUNTED)}


def _whole(config: type[SaeConfig | TrainConfig], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings in the order of `config`, with those that came after the record; none where none are known."""
    known = LATER_SETTINGS | dict(tree) if tree else {}
    return {name: known[name] for name in config.__dataclass_fields__ if name in known}


def _value(value: Any) -> str:
    """A setting as in YAML; a list without spaces, since ", " parts settings, and a label of a chart into lines."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def recorded_settings(tree: Mapping[str, Any]) -> SaeConfig:
    """The settings in a record.json. Those that came after the record have their defaults."""
    return SAE_KINDS[tree["kind"]](**tree)


def recorded_seed(record: Mapping[str, Any]) -> int | None:
    """Seed of the training in a record.json; None for an SAE of another maker, of whose training nothing is known."""
    return (record.get("train") or {}).get("seed")


def sae_id(point: SaePoint, *, harvest: str, d_in: int) -> str:
    """`l16.mlp-fc2.standard-20480.l1-3.<hash>`, known before training."""
    skip = {"expansion_factor", "d_sae"}
    settings = {k: v for k, v in _settings(point.sae).items() if k not in skip and v is not None}
    d_sae = point.sae.width(d_in)
    train = {k: v for k, v in _settings(point.train).items() if k not in UNCOUNTED}
    given = {"harvest": harvest, "hook": point.hook, "d_sae": d_sae, "sae": settings, "train": train}
    if point.train.lr is None:
        given["recipe"] = RECIPE_VERSION
    if getattr(point.sae, "target_l0", None) is not None:
        given["steering"] = STEERING_VERSION
    is_stepped = point.sae.control not in UNSTEPPED_CONTROLS
    if is_stepped and point.train.resample_at and point.sae.kind in RESAMPLING_VERSIONS:
        given["resampling"] = RESAMPLING_VERSIONS[point.sae.kind]
    parts = [hook_label(point.hook), f"{point.sae.kind}-{d_sae}", sparsity_label(point.sae).replace(" ", "-").lower()]
    if point.sae.control != "none":
        parts.append(point.sae.control.replace("_", "-"))
    return ".".join([*parts, fingerprint("sae", TRAINING_VERSIONS.get(point.sae.kind, 1), given)])


def evaluation_id(evaluate: EvaluateConfig, *, foreign_digest: str | None = None) -> str:
    """Id of how an SAE is measured; a change measures anew and trains nothing. foreign_digest: of the foreign text."""
    given = _settings(evaluate)
    if evaluate.foreign_source is None:
        given = {name: value for name, value in given.items() if not name.startswith("foreign_")}
    else:
        given["foreign_source"] = foreign_digest  # the text, wherever it lies
    return "e." + fingerprint("evaluation", 2, given)  # 2: cross-entropy over windows from all of the held-out text


def sweep_id(name: str, sae_ids: Sequence[str], evaluation: str) -> str:
    """`demo.<hash>` over the SAEs of the grid and how they are measured."""
    return f"{name}." + fingerprint("sweep", 1, {"saes": sorted(sae_ids), "evaluation": evaluation})


def pack_id(sae_ids: Sequence[str]) -> str:
    """Names a pack's checkpoints; another composition starts anew."""
    return "p." + fingerprint("pack", 1, {"saes": sorted(sae_ids)})
