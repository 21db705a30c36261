"""Triton kernels of a training step on a GPU: what PyTorch's own operators would take several passes over memory for.

Loaded only where `pattern.kernels_of` says so; PyTorch's CUDA builds bring Triton. All sums run in an order that the
shapes fix, without atomic additions of floats, so that the same step gives the same bits. Sums are in float32. With
TRITON_INTERPRET=1 they run on a CPU, which is how the tests compare them with plain formulas.
"""

from midiscover.sae.kernels.activate import jump, jump_backward, relu_backward, relu_with_sums_
from midiscover.sae.kernels.adam import adam_
from midiscover.sae.kernels.gather import row_dots, scaled_rows, segment_sums, weighted_rows
from midiscover.sae.kernels.select import WIDEST, top_of_batch, top_of_tokens

__all__ = [
    "WIDEST",
    "adam_",
    "jump",
    "jump_backward",
    "relu_backward",
    "relu_with_sums_",
    "row_dots",
    "scaled_rows",
    "segment_sums",
    "top_of_batch",
    "top_of_tokens",
    "weighted_rows",
]
