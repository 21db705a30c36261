"""SAELens folders of any version: cfg.json in the terms of version 6, and the SAE that it and its weights make.

Before version 6 everything stood side by side in one object, some names were others, and TopK was an activation
function of a `standard` SAE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from midiscover.errors import CorruptError, UserError
from midiscover.sae.base import Sae
from midiscover.sae.registry import FOLDED, folded_sae

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def modern_cfg(cfg: Any, name: str) -> dict[str, Any]:
    """A cfg.json as SAELens itself understands it: one of version 6 as it is, an older one in its terms.

    name: of the folder, for errors. CorruptError for what is no JSON object, UserError for an activation function that
    no architecture of version 6 has.
    """
    if not isinstance(cfg, Mapping):
        raise CorruptError(f"The cfg.json of {name} holds no JSON object.")
    if _major(cfg) >= 6:
        return dict(cfg)
    cfg = {_RENAMED.get(key, key): value for key, value in cfg.items()}
    architecture, activation = cfg.get("architecture", "standard"), cfg.get("activation_fn") or "relu"
    given = cfg.get("activation_fn_kwargs")
    k = given.get("k", cfg.get("k")) if isinstance(given, Mapping) else cfg.get("k")
    if activation == "topk" and k is not None:
        architecture = "topk"
    elif activation != "relu" and architecture != "topk":
        raise UserError(
            f"The activation_fn '{activation}' of {name} is not supported; relu is, and topk with its k in "
            "activation_fn_kwargs."
        )
    reshapes = "hook_z" if "hook_z" in str(cfg.get("hook_name")) else "none"
    defaults = {"prepend_bos": True, "reshape_activations": reshapes}
    return defaults | cfg | {"architecture": architecture} | ({"k": k} if architecture == "topk" else {})


def checked_sae(cfg: Mapping[str, Any], weights: Mapping[str, Tensor], name: str) -> Sae:
    """The SAE of a `modern_cfg` and the weights beside it, float32; its decoder rows and its scaling are left alone.

    name: of the folder, for errors. UserError for what this version does not compute, CorruptError where weights and
    settings do not belong together or are not finite.
    """
    architecture = cfg.get("architecture")
    if architecture not in tuple(FOLDED):  # of whatever type
        raise UserError(f"The architecture '{architecture}' of {name} is not known; known are {', '.join(FOLDED)}.")
    for width in ("d_in", "d_sae", *(["d_out"] if cfg.get("d_out") is not None else [])):
        if not _is_count(cfg.get(width)):
            raise CorruptError(f"The settings of {name} lack {width}, or it is no whole number above 0.")
    if architecture == "topk":
        k = whole_k(cfg.get("k"), name)
        if k > cfg["d_sae"]:
            raise UserError(f"k is {k} in {name}; of {cfg['d_sae']} features, 1 to {cfg['d_sae']} can be kept.")
        cfg = {**cfg, "k": k}
    scaling = weights.get("scaling_factor")  # of every SAE before version 6, where it changed nothing
    if scaling is not None and not bool((scaling == 1).all()):
        raise UserError(f"{name} has a scaling_factor that is not 1, which no version of SAELens from 6 on computes.")
    weights = {key: value for key, value in weights.items() if key != "scaling_factor"}
    try:
        sae = folded_sae(cfg, weights)
    except RuntimeError as error:  # of load_state_dict: names or shapes, over several lines
        reason = " ".join(str(error).split()).rstrip(". ")
        raise CorruptError(
            f"The weights of {name} are not those of a {architecture} SAE of its widths: {reason}."
        ) from None
    wrong = [key for key, value in weights.items() if not value.isfinite().all()]
    if wrong:
        raise CorruptError(f"{wrong[0]} in the weights of {name} holds numbers that are not finite.")
    return sae


def whole_k(k: Any, name: str) -> int:
    """Features kept per token, of a TopK or BatchTopK SAE. UserError for anything but a whole number above 0."""
    if isinstance(k, bool) or not isinstance(k, int | float) or k % 1 != 0 or k < 1:
        raise UserError(f"k is {k!r} in {name}; a whole number above 0 is needed.")
    return int(k)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _major(cfg: Mapping[str, Any]) -> int:
    """Version of the SAELens that wrote it; 0 where it does not say."""
    metadata = cfg.get("metadata")
    told = cfg.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, Mapping) else None)
    found = re.match(r"\d+", str(told or ""))
    return int(found[0]) if found else 0
