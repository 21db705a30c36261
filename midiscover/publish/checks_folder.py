"""Files that are there, and cfg.json: what SAELens and this version read of it."""

from __future__ import annotations

import re
from typing import Any

from midiscover.ids import hook_layer
from midiscover.publish.checks import (
    CFG,
    RECORD,
    SPARSITY,
    TRAINING,
    WEIGHTS,
    Kind,
    Skipped,
    Subject,
    check,
    expect,
    fail_for,
    whole,
)
from midiscover.sae.registry import FOLDED

_DATA = (
    ".json",
    ".yaml",
    ".safetensors",
    ".parquet",
    ".md",
    ".png",
    ".svg",
    ".pdf",
    ".html",
    ".csv",
    ".gz",
    ".jsonl",
    ".npy",
)
_SEEDS = "sae_model.pt"
LICENCES = ("LICENSE", "LICENSE.txt")
"""May lie beside an export: whoever publishes it puts it there."""
_KEYS: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    ("architecture", str),
    ("d_in", int),
    ("d_sae", int),
    ("dtype", str),
    ("apply_b_dec_to_input", bool),
    ("normalize_activations", str),
    ("metadata", dict),
)
_SAE: tuple[Kind, ...] = ("sae",)
_FOLDERS: tuple[Kind, ...] = ("sae", "saelens")
_ALL: tuple[Kind, ...] = ("sae", "saelens", "bundle", "neuronpedia")


def metadata(subject: Subject) -> dict[str, Any]:
    """The metadata of cfg.json."""
    found = subject.json(CFG).get("metadata")
    if not isinstance(found, dict):
        raise Skipped("cfg.json has no metadata")
    return found


def _there(subject: Subject, name: str) -> None:
    expect(subject.has(name), f"there is no {name}")


@check("files", _FOLDERS)
def cfg_is_there(subject: Subject) -> None:
    """cfg.json is there."""
    _there(subject, CFG)


@check("files", _FOLDERS)
def weights_are_there(subject: Subject) -> None:
    """sae_weights.safetensors is there."""
    _there(subject, WEIGHTS)


@check("files", _SAE)
def sparsity_is_there(subject: Subject) -> None:
    """sparsity.safetensors is there."""
    _there(subject, SPARSITY)


@check("files", _SAE)
def record_is_there(subject: Subject) -> None:
    """record.json is there, which makes the folder a finished SAE."""
    _there(subject, RECORD)


@check("files", _SAE)
def training_is_there(subject: Subject) -> None:
    """training.json is there."""
    _there(subject, TRAINING)


@check("files", _ALL)
def files_are_data(subject: Subject) -> str:
    """No file is of a kind that may run code when it is loaded."""
    names = subject.names()
    data = [name for name in names if name.endswith((*_DATA, _SEEDS)) or name.rpartition("/")[2] in LICENCES]
    fail_for([f"{name} is no data" for name in names if name not in data])
    return f"{len(names)} files"


@check("cfg")
def cfg_is_json(subject: Subject) -> None:
    """cfg.json is a JSON object of finite numbers."""
    subject.require_json(CFG)


@check("cfg")
def cfg_has_its_keys(subject: Subject) -> None:
    """The keys that SAELens needs are there, each of its type."""
    cfg = subject.json(CFG)
    problems = [f"{name} is missing" for name, _ in _KEYS if name not in cfg]
    for name, kind in _KEYS:
        value = cfg.get(name)
        if name in cfg and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            problems.append(f"{name} is {value!r}, no {getattr(kind, '__name__', kind)}")
        elif kind is int and isinstance(value, int) and value < 1:
            problems.append(f"{name} is {value}")
    fail_for(problems)


@check("cfg")
def architecture_is_known(subject: Subject) -> str:
    """The architecture is one that this version computes."""
    found = subject.json(CFG).get("architecture")
    if not isinstance(found, str):
        raise Skipped("architecture is no text")
    expect(found in FOLDED, f"'{found}' is not known; known are {', '.join(FOLDED)}")
    return found


@check("cfg")
def dtype_is_float32(subject: Subject) -> None:
    """The dtype is float32."""
    found = subject.json(CFG).get("dtype")
    if not isinstance(found, str):
        raise Skipped("dtype is no text")
    expect(found.removeprefix("torch.") == "float32", f"dtype is {found}")


@check("cfg")
def scaling_is_folded(subject: Subject) -> None:
    """normalize_activations is none: scaling is folded into the weights."""
    found = subject.json(CFG).get("normalize_activations")
    if not isinstance(found, str):
        raise Skipped("normalize_activations is no text")
    expect(found == "none", f"normalize_activations is {found}")


@check("cfg")
def nothing_is_reshaped(subject: Subject) -> None:
    """reshape_activations is none, or left out."""
    found = subject.json(CFG).get("reshape_activations", "none")
    expect(found == "none", f"reshape_activations is {found}")


@check("cfg")
def b_dec_is_applied(subject: Subject) -> None:
    """apply_b_dec_to_input is true, and false for transcoders."""
    cfg = subject.json(CFG)
    applied, architecture = cfg.get("apply_b_dec_to_input"), cfg.get("architecture")
    if architecture not in FOLDED or not isinstance(applied, bool):
        raise Skipped("the architecture is not known, or apply_b_dec_to_input is missing")
    expect(
        applied != FOLDED[architecture].transcodes, f"it is {str(applied).lower()} for the architecture {architecture}"
    )


@check("cfg")
def k_is_possible(subject: Subject) -> str:
    """A TopK SAE has a k between 1 and d_sae."""
    cfg = subject.json(CFG)
    if cfg.get("architecture") != "topk":
        raise Skipped("of TopK SAEs only")
    k, d_sae = cfg.get("k"), whole(cfg, "d_sae")
    expect(isinstance(k, int) and not isinstance(k, bool) and 0 < k <= d_sae, f"k is {k}")
    return f"k {k}"


@check("cfg")
def saelens_version_is_named(subject: Subject) -> str:
    """metadata.sae_lens_version is 6 or later: without it SAELens drops the metadata."""
    found = metadata(subject).get("sae_lens_version")
    match = re.match(r"(\d+)\.\d+", found) if isinstance(found, str) else None
    expect(match is not None and int(match[1]) >= 6, f"sae_lens_version is {found!r}")
    return str(found)


@check("cfg")
def prepend_bos_is_told(subject: Subject) -> None:
    """metadata.prepend_bos is true or false."""
    found = metadata(subject).get("prepend_bos")
    expect(isinstance(found, bool), f"prepend_bos is {found!r}")


@check("cfg")
def context_size_is_told(subject: Subject) -> None:
    """metadata.context_size is a whole number above 0."""
    found = metadata(subject).get("context_size")
    expect(isinstance(found, int) and not isinstance(found, bool) and found > 0, f"context_size is {found!r}")


@check("cfg")
def hook_is_named(subject: Subject) -> str:
    """metadata.model_name and hook_name are texts, and a hook_layer is the layer of the hook."""
    found = metadata(subject)
    empty = [name for name in ("model_name", "hook_name") if not isinstance(found.get(name), str) or not found[name]]
    fail_for([f"{name} is {found.get(name)!r}" for name in empty])
    hook, layer = found["hook_name"], found.get("hook_layer")
    expect(layer in (None, hook_layer(hook)), f"hook_layer is {layer!r} for the hook {hook}")
    return str(hook)
