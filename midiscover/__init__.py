"""Sparse autoencoders on language-model activations, from text to served features.

Importing this package loads neither torch nor ray. `load_sae` is the one name that lives here:

    >>> from midiscover import load_sae
    >>> sae = load_sae("l15.mlp-down_proj.standard-4608.l1-2", store="./midiscover-store")
    >>> features = sae.encode(activations)  # [tokens, d_in] -> [tokens, d_sae]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from midiscover.saes import LoadedSae

__version__ = "0.1.0"


def load_sae(source: str | Path, *, store: str | None = None, device: str = "cpu") -> LoadedSae:
    """Load a trained SAE by id, unique id prefix, folder or URI; see `midiscover.saes.load_sae`."""
    from midiscover.saes import load_sae as load

    return load(source, store=store, device=device)
