"""Architectures by their `kind`. An unknown kind is an error, never a plain ReLU."""

from __future__ import annotations

from typing import Any

from midiscover.errors import UserError
from midiscover.sae.base import Sae
from midiscover.sae.standard import StandardSae
from midiscover.sae.topk import TopKSae

ARCHITECTURES: dict[str, type[Sae]] = {cls.kind: cls for cls in (StandardSae, TopKSae)}


def make_sae(config: Any, d_in: int, d_sae: int) -> Sae:
    """An SAE of the architecture that `config.kind` names, with zero weights. UserError for an unknown kind."""
    cls = ARCHITECTURES.get(config.kind)
    if cls is None:
        raise UserError(
            f"'{config.kind}' is no architecture that this version knows; known are {', '.join(ARCHITECTURES)}."
        )
    return cls(config, d_in, d_sae)
