"""cfg.json of SAELens, of any version, in the terms of version 6.

Before it everything stood side by side in one object, some names were others, and TopK was an activation function of a
`standard` SAE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from midiscover.errors import UserError

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def modern_cfg(cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A cfg.json as SAELens itself understands it: one of version 6 as it is, an older one in its terms.

    name: of the folder, for errors. UserError for an activation function that no architecture of version 6 has.
    """
    if _major(cfg) >= 6:
        return dict(cfg)
    cfg = {_RENAMED.get(key, key): value for key, value in cfg.items()}
    architecture, activation = cfg.get("architecture", "standard"), cfg.get("activation_fn") or "relu"
    k = (cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k"))
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


def _major(cfg: Mapping[str, Any]) -> int:
    """Version of the SAELens that wrote it; 0 where it does not say."""
    metadata = cfg.get("metadata")
    told = cfg.get("sae_lens_version") or (metadata.get("sae_lens_version") if isinstance(metadata, Mapping) else None)
    found = re.match(r"\d+", str(told or ""))
    return int(found[0]) if found else 0
