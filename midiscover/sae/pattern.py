"""Where a sparse code has its entries, and products with such matrices: by PyTorch on a CPU, by kernels on a GPU."""

from __future__ import annotations

import logging
import warnings
from functools import cache, cached_property
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from midiscover.cards import is_out_of_memory, lost_its_card

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)  # once a process, on stderr

log = logging.getLogger(__name__)

KERNEL_DEVICES = ("cuda",)
SHORT = 2**16
"""Features that 16 bits can number."""


def kernels_of(device: torch.device) -> ModuleType | None:
    """`midiscover.sae.kernels` where it is to be used, else None.

    On a GPU that knows bfloat16 (Ampere or later), with Triton, which PyTorch's CUDA builds bring, and what Triton
    needs.
    """
    if device.type not in KERNEL_DEVICES or not _usable(device):
        return None
    from midiscover.sae import kernels

    return kernels


@cache
def _usable(device: torch.device) -> bool:
    if not suits_kernels(device):
        return False
    try:
        try_kernel(device)
    except Exception as error:  # of Triton, of the C compiler, or of the loader of what it made
        if is_out_of_memory(error) or lost_its_card():
            raise
        log.warning("steps are taken by PyTorch's operators, for no kernel can be built: %s", error)
        return False
    return True


def try_kernel(device: torch.device) -> None:
    """Run a small kernel. The first one builds its launcher, for which Triton needs a C compiler and Python.h."""
    from midiscover.sae import kernels

    kernels.segment_sums(torch.tensor([0, 1], device=device), torch.ones(1, device=device))


def suits_kernels(device: torch.device) -> bool:
    """Whether a device is one for kernels, with Triton."""
    return find_spec("triton") is not None and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    )


class Pattern:
    """Places in [tokens, d_sae], by token: those of token t are `starts[t]` to `starts[t + 1]`."""

    def __init__(self, token: Tensor, feature: Tensor, tokens: int, d_sae: int, starts: Tensor | None = None) -> None:
        """token, feature: [n] int64 of each place, tokens rising; starts [tokens + 1] where it is known already."""
        self.token, self.feature, self.tokens, self.d_sae = token, feature, tokens, d_sae
        self.kernels = kernels_of(feature.device)
        self.known_starts = starts

    @classmethod
    def of_places(cls, places: Tensor, tokens: int, d_sae: int) -> Pattern:
        """From [n] token * d_sae + feature, rising."""
        token = places // d_sae
        return cls(token, places - token * d_sae, tokens, d_sae)

    @classmethod
    def of_rows(cls, features: Tensor, d_sae: int) -> Pattern:
        """From the features [tokens, k] of each token."""
        tokens, k = features.shape
        token = torch.arange(tokens, device=features.device).repeat_interleave(k)
        return cls(token, features.flatten(), tokens, d_sae)

    @cached_property
    def starts(self) -> Tensor:
        """[tokens + 1]."""
        return _starts(self.token, self.tokens) if self.known_starts is None else self.known_starts

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """[n] the places' numbers by feature, and [d_sae + 1] where each feature's begin."""
        if self.feature.device.type == "cpu" and self.d_sae <= SHORT:  # which NumPy sorts ten times as fast as torch
            feature = self.feature.numpy()
            order = torch.from_numpy(np.argsort(feature.astype(np.uint16), kind="stable"))
            counts = torch.from_numpy(np.bincount(feature, minlength=self.d_sae))
            return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        keys = self.feature.int() if self.kernels else self.feature  # half the bits to sort by
        ordered, order = keys.sort(stable=True)
        return order, _starts(ordered, self.d_sae)

    def times(self, values: Tensor, rows: Tensor) -> Tensor:
        """S @ rows: [tokens, d] from rows [d_sae, d]; float32 on a GPU."""
        return self._sums_of_rows(self.feature, self.starts, values, rows, torch.float32)

    def transposed_times(self, values: Tensor, rows: Tensor) -> Tensor:
        """S.T @ rows: [d_sae, d] from rows [tokens, d], in their type."""
        order, starts = self.by_feature
        return self._sums_of_rows(self.token[order], starts, values[order], rows, rows.dtype)

    def _sums_of_rows(self, which: Tensor, starts: Tensor, weights: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[len(starts) - 1, d]: weighted sums of rows[which[starts[i] : starts[i + 1]]]."""
        if self.kernels:
            return self.kernels.weighted_rows(which, starts, weights, rows, dtype)
        return embedding_bag(which, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)

    def dots(self, left: Tensor, right: Tensor) -> Tensor:
        """[n] dot products of left [tokens, d] with right [d_sae, d] at each place."""
        if self.kernels:
            return self.kernels.row_dots(self.starts, self.feature, left, right)
        empty = self.matrix(left.new_zeros(len(self.token)))
        return torch.sparse.sampled_addmm(empty, left, right.T, beta=0.0).values()

    def sums(self, values: Tensor) -> Tensor:
        """[d_sae] sums of values [n] by feature."""
        if self.kernels:
            order, starts = self.by_feature
            return self.kernels.segment_sums(starts, values[order])
        return values.new_zeros(self.d_sae).index_add_(0, self.feature, values)

    def spread(self, each: Tensor) -> Tensor:
        """[n] for each place what is its feature's of `each` [d_sae]."""
        return _Spread.apply(each, self)

    def part(self, first: int, count: int) -> tuple[Tensor, Pattern]:
        """Numbers of the places in some features, and these places as a pattern of their own."""
        kept = ((self.feature >= first) & (self.feature < first + count)).nonzero()[:, 0]
        return kept, Pattern(self.token[kept], self.feature[kept] - first, self.tokens, count)

    def matrix(self, values: Tensor) -> Tensor:
        """S as PyTorch's compressed rows."""
        size = (self.tokens, self.d_sae)
        return torch.sparse_csr_tensor(self.starts, self.feature, values, size=size, check_invariants=False)


def _starts(rising: Tensor, count: int) -> Tensor:
    """[count + 1] where each number from 0 to count begins among rising ones [n]."""
    return torch.searchsorted(rising, torch.arange(count + 1, device=rising.device))


class _Spread(torch.autograd.Function):
    """each[feature]; autograd's own backward pass adds up in any order where there are several threads."""

    @staticmethod
    def forward(ctx: Any, each: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        return each[pattern.feature]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.pattern.sums(grads[0]), None


def places_of(mask: Tensor) -> Tensor:
    """[n] token * d_sae + feature of what holds in [tokens, d_sae], rising."""
    if mask.device.type == "cpu":  # torch's own takes twice as long
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def positive(values: Tensor) -> Tensor:
    """values > 0, contiguous and without a gradient; bool."""
    if values.device.type != "cpu" or values.dtype not in _SIGNED:
        return values > 0
    # As whole numbers of the same bits, which NumPy compares twenty times as fast as torch compares bfloat16. What is
    # not a number counts as positive, so that it reaches the loss.
    return torch.from_numpy(values.detach().view(_SIGNED[values.dtype]).numpy() > 0)


_SIGNED = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
