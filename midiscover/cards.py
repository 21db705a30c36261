"""Whether there is a card, and what its errors mean: memory that ran out, in whatever words, or a card that is lost."""

from __future__ import annotations

import torch

_NO_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
"""As the CUDA runtime and Triton say it, NVIDIA's libraries (cuBLAS, cuDNN, cuSPARSE), and PyTorch of main memory."""


def default_device() -> str:
    """Where torch computes unless somebody says otherwise: the first GPU, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether less at once would do: PyTorch's own error, or that of what allocates beside it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def lost_its_card() -> bool:
    """Whether this process, which computes on a card, can use it no more after an error.

    After an illegal access or an uncorrectable ECC error all that it asks of CUDA fails, in whatever words, until it
    ends; after others, such as a kernel that is not built for this card, nothing else does.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
