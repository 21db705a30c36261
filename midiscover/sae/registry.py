"""Architectures by the `kind` of our settings and by the `architecture` of a SAELens cfg.json.

An unknown one is an error, never a plain ReLU. A new architecture is a class and a line here, and one in `FOLDED` where
SAELens has an architecture of its own for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from midiscover.errors import UserError
from midiscover.sae.base import Sae
from midiscover.sae.batchtopk import BatchTopKSae
from midiscover.sae.gated import GatedSae
from midiscover.sae.jumprelu import JumpReluSae
from midiscover.sae.matryoshka import MatryoshkaSae
from midiscover.sae.standard import StandardSae
from midiscover.sae.topk import TopKSae
from midiscover.sae.transcoder import SkipTranscoderSae, TranscoderSae

ARCHITECTURES: dict[str, type[Sae]] = {
    cls.kind: cls
    for cls in (
        StandardSae,
        GatedSae,
        TopKSae,
        BatchTopKSae,
        JumpReluSae,
        MatryoshkaSae,
        TranscoderSae,
        SkipTranscoderSae,
    )
}
"""What can be trained."""

FOLDED: dict[str, type[Sae]] = {
    cls.saelens_architecture: cls
    for cls in (StandardSae, GatedSae, TopKSae, JumpReluSae, TranscoderSae, SkipTranscoderSae)
}
"""What can be loaded: SAELens' architecture -> the class that computes it. Several kinds may share one."""


def make_sae(config: Any, d_in: int, d_sae: int, d_out: int | None = None) -> Sae:
    """An SAE of the architecture that `config.kind` names, with zero weights. UserError for an unknown kind.

    d_out: width of the hook that a transcoder predicts; d_in for all others.
    """
    cls = ARCHITECTURES.get(config.kind)
    if cls is None:
        raise UserError(
            f"'{config.kind}' is no architecture that this version knows; known are {', '.join(ARCHITECTURES)}."
        )
    return cls(config, d_in, d_sae, d_out)


def folded_sae(cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Sae:
    """The SAE of a SAELens folder with raw inputs. UserError for an architecture that this version does not know."""
    architecture = cfg.get("architecture")
    if architecture not in FOLDED:
        raise UserError(
            f"The architecture '{architecture}' is not known to this version; known are {', '.join(FOLDED)}."
        )
    return FOLDED[architecture].from_folded(cfg, weights)
