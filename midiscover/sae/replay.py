"""A step's work on a GPU, recorded once and replayed: one launch instead of a hundred.

At phi-2's width a step of 4 ms needs 5 ms of Python to be launched; of a small SAE's step launching is nearly all.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

WARM = 3
"""Calls before a recording, in which kernels are compiled and libraries choose theirs."""

_log = logging.getLogger(__name__)
_keepers: dict[int, torch.cuda.CUDAGraph] = {}
"""A graph for each device that outlives the others, for a pool of memory ends with its last graph."""
_inputs: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()
"""Where recordings find their arguments, by place and form: one recording runs after another."""


class Replayed:
    """A function of tensors that takes its steps by a CUDA graph, where one can hold it.

    What it reads besides its arguments must stay where it is in memory, and what it writes it must write in place. It
    must not wait for the device: one that does is called as it is ever after.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        self.function = function
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.waits = False

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The function's result; tensors of its own."""
        self.calls += 1
        if self.calls == WARM:
            return self._watched(inputs)
        if self.calls == WARM + 1 and not self.waits:
            self._record(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return [output.clone() for output in self.outputs]

    def _watched(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """A call that shows whether the function waits: a recording that fails leaves PyTorch in disorder."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            said.clear()  # that the mode is a prototype
            try:
                result = self.function(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [str(warning.message) for warning in said if "synchroniz" in str(warning.message)]
        self.waits = bool(waits)
        if waits:
            _log.info("a step is not recorded, for it waits for the device: %s", waits[0])
        return result

    def _record(self, inputs: Sequence[Tensor]) -> None:
        device = inputs[0].device
        self.inputs = [_shared(place, given) for place, given in enumerate(inputs)]
        graph = torch.cuda.CUDAGraph()
        # Other threads go on copying batches.
        with torch.cuda.graph(graph, pool=_pool(device), capture_error_mode="thread_local"):
            self.outputs = self.function(*self.inputs)
        self.graph = graph


def _shared(place: int, given: Tensor) -> Tensor:
    """The tensor that all recordings read an argument of this place and form from."""
    key = place, given.device, given.dtype, given.shape
    held = _inputs.get(key)
    if held is None:
        held = _inputs[key] = given.clone()
    return held


def _pool(device: torch.device) -> Any:
    """What all recordings take memory from: the steps of a pack run one after another and need none in between."""
    index = device.index or 0
    if index not in _keepers:
        keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(keeper, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)
        _keepers[index] = keeper
    return _keepers[index].pool()


def end_pools() -> None:
    """Between packs: the memory of recordings that are gone is PyTorch's again, and the card's where it is asked to."""
    _keepers.clear()
