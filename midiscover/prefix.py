"""The blocks of a language model before a hook: passes that differ from the hook on only need not run them again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from midiscover.ids import first_block

log = logging.getLogger(__name__)


class Prefix:
    """What the blocks before the first of some hooks make of a text, kept from one pass for the next ones.

    It asks of a model that what passes from block to block is the output of each, which `check` finds out.

    >>> prefix = Prefix(lm.model, [hook])
    >>> with prefix.kept():
    ...     clean = lm.logits(ids)
    >>> with prefix.skipped():
    ...     zeroed = lm.logits(ids, replace={hook: torch.zeros_like})
    """

    def __init__(self, model: nn.Module, hooks: Iterable[str]) -> None:
        """No block is skipped where the hooks lie in the first one, in none, or in two different lists of blocks."""
        self.blocks = blocks_before(model, hooks)
        self.checked = False
        self.output: Any = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What the last pass in the body computes before the hooks is kept."""

        def keep(_block: nn.Module, _args: Any, output: Any) -> None:
            self.output = _copied(output)

        handle = self.blocks[-1].register_forward_hook(keep) if self.blocks else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Passes in the body, over the same text with the same mask, take what was kept."""
        before = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = lambda *_args, **_kwargs: _copied(self.output)  # a later block may write into it
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def check(self, run: Callable[[], Tensor], expected: Tensor) -> None:
        """Once: skip nothing from now on where a pass that skips does not give `expected`, bit for bit."""
        if self.checked or not self.blocks:
            return
        self.checked = True
        try:
            with self.skipped():
                same = torch.equal(run(), expected)
        except Exception as error:  # whatever a model's own code raises where it misses what an earlier block left
            log.info("blocks before the hook are run again: %s: %s", type(error).__name__, error)
            same = False
        if not same:
            self.blocks = []


def blocks_before(model: nn.Module, hooks: Iterable[str]) -> list[nn.Module]:
    """The blocks before the first one that holds any of the hooks, of the one list that holds all of them."""
    block = first_block(hooks)
    if block is None:
        return []
    path, number = block
    layers = model.get_submodule(path)
    return list(layers)[:number] if isinstance(layers, nn.ModuleList) else []


def _copied(output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, output)
