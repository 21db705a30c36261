"""Attention compiled for a GPU: a few kernels in the place of the dozen small operators that transformers writes out.

Of phi-2's pass on an H200 a third goes into operators between the matrix products, half of it where rotary embeddings
cut heads apart, turn them and put them together again. Only the modules of attention are compiled, so that hooks
elsewhere are called as ever; while a hook lies inside one, that module runs as it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PAYS_FROM = 8_000_000
"""Tokens of one process from which it pays: it takes 10 s at first and saves 1.6 s a million of phi-2's tokens on an
H200 (tests/bench/RESULTS.md)."""

log = logging.getLogger(__name__)


class CompiledAttention:
    """The compiled modules of one model."""

    def __init__(self, model: nn.Module, compiler: Callable[..., Any] = torch.compile) -> None:
        self.paths = attention_paths(model)
        self.as_written: frozenset[str] = frozenset()
        self.failed = False
        for path in self.paths:
            module = model.get_submodule(path)
            module.forward = self._either(path, module.forward, compiler(module.forward, dynamic=True))

    @contextmanager
    def without(self, hooks: Iterable[str]) -> Iterator[None]:
        """In the body, modules that hold one of these hooks run as they are written."""
        before, places = self.as_written, [hook.removesuffix(":in") for hook in hooks]
        self.as_written = before.union(p for p in self.paths if any(place.startswith(f"{p}.") for place in places))
        try:
            yield
        finally:
            self.as_written = before

    def _either(self, path: str, written: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import TorchDynamoException  # loads the compiler, which takes seconds

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.failed or path in self.as_written:
                return written(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                log.warning("attention is not compiled: %s", " ".join(str(error).split("\n")[:2]))
                self.failed = True
            return written(*args, **kwargs)

        return forward


def attention_paths(model: nn.Module) -> list[str]:
    """Paths of the outermost modules whose class is named as transformers names attention."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if type(module).__name__.endswith("Attention") and not inside:
            found.append(path)
    return found
