"""A language model without the layers that no hook needs: less memory for whoever only reads activations."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from midiscover.ids import hook_layer
from midiscover.lm import LanguageModel


def cut_after(lm: LanguageModel, hooks: Iterable[str]) -> None:
    """Take out every layer above the deepest of `hooks`; activations of these hooks stay what they were.

    Where one of them is in no layer, nothing is taken out: it may come after the last.
    """
    wanted = list(hooks)
    depths = [hook_layer(hook) for hook in wanted]
    found = [depth for depth in depths if depth is not None]
    if not found or len(found) < len(depths):
        return
    container = _container(wanted[0])
    layers = lm.model.get_submodule(container)
    assert isinstance(layers, nn.ModuleList)
    parent, _, name = container.rpartition(".")
    setattr(lm.model.get_submodule(parent), name, layers[: max(found) + 1])


def holds(lm: LanguageModel, hooks: Iterable[str]) -> bool:
    """Whether the layers of these hooks are still there."""
    for hook in hooks:
        depth = hook_layer(hook)
        if depth is not None and depth >= len(list(lm.model.get_submodule(_container(hook)).children())):
            return False
    return True


def _container(hook: str) -> str:
    """`model.layers` of `model.layers.15.mlp`."""
    parts = hook.split(".")
    return ".".join(parts[: parts.index(str(hook_layer(hook)))])
