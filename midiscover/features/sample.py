"""Rows drawn beforehand, with their sparse codes and their inputs: what correlations are measured on.

Sums over all tokens would need [d_sae, d_sae] numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor


class Sample:
    """Rows with their codes, as (row, feature, value), and their inputs."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.numbers, self.inputs = state["numbers"], state["inputs"]
        self.row, self.feature, self.value = state["row"], state["feature"], state["value"]

    @classmethod
    def empty(cls, d_in: int) -> Self:
        """No row."""
        return cls(
            {
                "numbers": torch.empty(0, dtype=torch.int64),
                "inputs": torch.empty(0, d_in, dtype=torch.bfloat16),
                "row": torch.empty(0, dtype=torch.int32),
                "feature": torch.empty(0, dtype=torch.int32),
                "value": torch.empty(0),
            }
        )

    def state(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: getattr(self, name) for name in ("numbers", "inputs", "row", "feature", "value")}

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def joined(cls, samples: Sequence[Self]) -> Self:
        """Several samples as one, in the order of their rows' numbers."""
        starts = torch.tensor([0, *map(len, samples)]).cumsum(0)
        numbers = torch.cat([sample.numbers for sample in samples])
        order = numbers.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        moved = [place[sample.row.long() + int(start)] for sample, start in zip(samples, starts, strict=False)]
        row = torch.cat(moved) if moved else torch.empty(0, dtype=torch.int64)
        feature = torch.cat([sample.feature for sample in samples]).long()
        by_row = (row * (1 << 32) + feature).argsort()
        return cls(
            {
                "numbers": numbers[order],
                "inputs": torch.cat([sample.inputs for sample in samples])[order],
                "row": row[by_row].int(),
                "feature": feature[by_row].int(),
                "value": torch.cat([sample.value for sample in samples])[by_row],
            }
        )
