"""A language model without the layers that no hook needs: less memory for whoever only reads activations."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from midiscover.ids import hook_block
from midiscover.lm import LanguageModel


def cut_after(lm: LanguageModel, hooks: Iterable[str]) -> None:
    """Take out every layer above the deepest of `hooks`; activations of these hooks stay what they were.

    Where one of them is in no layer, nothing is taken out: it may come after the last.
    """
    wanted = list(hooks)
    blocks = [hook_block(hook) for hook in wanted]
    found = [block for block in blocks if block is not None]
    if not found or len(found) < len(blocks):
        return
    container = found[0][0]
    layers = lm.model.get_submodule(container)
    assert isinstance(layers, nn.ModuleList)
    parent, _, name = container.rpartition(".")
    setattr(lm.model.get_submodule(parent), name, layers[: max(number for _, number in found) + 1])


def holds(lm: LanguageModel, hooks: Iterable[str]) -> bool:
    """Whether the layers of these hooks are still there."""
    for hook in hooks:
        block = hook_block(hook)
        if block is not None and block[1] >= len(list(lm.model.get_submodule(block[0]).children())):
            return False
    return True
