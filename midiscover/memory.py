"""What training takes of a card's memory, reckoned before anything is allocated. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

PARAMETER_BYTES = 16
"""Of a parameter in training: weight, gradient and Adam's two moments, float32."""
CODE_TENSORS = 6
"""[tokens, d_sae] float32 tensors that a step holds at once: pre-activations, code, what autograd keeps, gradients."""
ROW_TENSORS = 8
"""[tokens, d] float32 tensors that it holds of inputs, outputs and residuals."""
FIXED_BYTES = 1 << 30
"""CUDA's context and workspaces."""
MODEL_BYTES = {"bfloat16": 2, "float32": 4}
"""Of a language model's parameter, by `model.dtype`."""
USABLE = 0.95
"""Of a card's memory, or of what is free of it: the rest goes to what is not reckoned here."""
MEASURED_ROWS = 4096
"""Held-out rows that SAEs are measured on at a time; bounds the table [rows, d_sae] of their features."""
SPLICED_WINDOWS = 8
"""Windows per spliced forward pass at most."""
SPLICED_LOGITS = 2**28
"""Numbers in its table [tokens, vocabulary] at most, or one window's: 1 GiB in float32."""


class Sizes(NamedTuple):
    """Of one SAE in training."""

    d_in: int
    d_sae: int
    d_out: int
    batch_size: int
    skip: int = 0
    """Parameters of a linear skip connection."""

    @property
    def kept_bytes(self) -> int:
        """What stays allocated between its steps."""
        return PARAMETER_BYTES * (self.d_sae * (self.d_in + self.d_out + 2) + self.skip)

    @property
    def step_bytes(self) -> int:
        """What its step allocates and frees again."""
        return 4 * self.batch_size * (CODE_TENSORS * self.d_sae + ROW_TENSORS * (self.d_in + self.d_out))


def training_bytes(saes: Sequence[Sizes]) -> int:
    """Memory of a pack whose SAEs are stepped one after another: all that is kept, and the largest step."""
    return FIXED_BYTES + sum(sae.kept_bytes for sae in saes) + max((sae.step_bytes for sae in saes), default=0)


def measuring_bytes(saes: Sequence[Sizes]) -> int:
    """Memory of SAEs that are measured together, beside the context and the language model: weights, one's features."""
    weights = sum(4 * sae.d_sae * (sae.d_in + sae.d_out) for sae in saes)
    return weights + max((sae._replace(batch_size=MEASURED_ROWS).step_bytes for sae in saes), default=0)


def spliced_windows(context_size: int, vocabulary: int) -> int:
    """Windows per spliced forward pass."""
    return max(1, min(SPLICED_WINDOWS, SPLICED_LOGITS // (context_size * vocabulary)))


def spliced_bytes(context_size: int, vocabulary: int) -> int:
    """Memory of a spliced pass's tables: log-probabilities without a replacement, logits with one, two of a window."""
    return 4 * (2 * spliced_windows(context_size, vocabulary) + 2) * context_size * vocabulary


def fit_together(
    saes: Sequence[Sizes], limit: int, needed: Callable[[Sequence[Sizes]], int] = training_bytes
) -> list[range]:
    """Cut SAEs, in their order, into as few parts as fit `limit` bytes; one that is too large stands alone."""
    parts: list[range] = []
    start = 0
    for stop in range(1, len(saes) + 1):
        if stop - start > 1 and needed(saes[start:stop]) > limit:
            parts.append(range(start, stop - 1))
            start = stop - 1
    return [*parts, range(start, len(saes))] if saes else []
