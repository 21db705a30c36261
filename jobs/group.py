"""The processes of a Ray Train worker group as the training loop's `Group`: torch.distributed under two verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TorchGroup:
    """All processes of the default process group, which Ray Train has set up (nccl on GPUs, gloo on CPUs)."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """One message for all of them."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def any(self, mask: Tensor) -> Tensor:
        """By a maximum of bytes, which every backend has."""
        found = mask.to(torch.uint8)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.bool()

    def from_first(self, value: Any) -> Any:
        """What the first process gives, in all of them. Within one job: it travels pickled."""
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]
