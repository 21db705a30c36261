"""Token windows through a language model: the activations of many hooks from one pass, and which rows count.

Stored harvests, training on a live model and the evaluation on a foreign text all read in this way, so that the same
windows give the same rows wherever they are wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from midiscover.cards import is_out_of_memory
from midiscover.compiled import PAYS_FROM
from midiscover.config import HarvestConfig
from midiscover.errors import StageError
from midiscover.lm import LanguageModel
from midiscover.packing import Windows
from midiscover.store.blocks import Mask

MAX_NONFINITE_SHARE = 0.001
CPU_BATCH_TOKENS = 4096
"""Fixed on CPU: the last bits of a matrix product depend on the batch's shape, and blocks are promised bit for bit."""
GPU_BATCH_TOKENS = 16_384

_idle: list[torch.cuda.Stream] = []
"""Streams that nobody uses. PyTorch keeps what is freed for the stream that it was taken on, so they are few."""


def position_mask(ids: Tensor, doc: Tensor, special: Tensor, *, mask_first: bool) -> Tensor:
    """Mask codes [windows, context_size] that follow from the tokens alone: special tokens, first position, padding.

    ids, doc: [windows, context_size]; special: ids of the tokenizer's special tokens.
    """
    codes = torch.zeros(ids.shape, dtype=torch.uint8)
    codes[torch.isin(ids, special)] = Mask.SPECIAL
    if mask_first:
        codes[:, 0] = Mask.SPECIAL
    codes[doc == -1] = Mask.PADDING
    return codes


def row_mask(codes: Tensor, norm: Tensor, outlier_norm: float) -> Tensor:
    """Mask codes [rows] of a block: `codes` plus non-finite rows and rows of outlying norm.

    codes: [rows] from `position_mask`; norm: [rows] float32, non-finite where the activation is.
    """
    mask = codes.clone()
    finite = torch.isfinite(norm)
    usable = (mask == Mask.USABLE) & finite
    if usable.any():
        limit = outlier_norm * norm[usable].median()
        mask[usable & (norm > limit)] = Mask.OUTLIER
    mask[~finite & (mask != Mask.PADDING)] = Mask.NONFINITE
    return mask


class Computed(NamedTuple):
    """Windows that went through the model; on its device, which may still be at work on them."""

    ids: Tensor
    """[windows, context_size] int32, on the CPU."""
    codes: Tensor
    """[rows] from `position_mask`, on the CPU."""
    acts: dict[str, Tensor]
    """Hook -> [rows, d_in] bfloat16."""
    norms: dict[str, Tensor]
    """Hook -> [rows] float32, before rounding."""
    ready: torch.cuda.Event | None
    """After it both are what they say; None on a CPU, where they are at once."""

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """In the body a GPU's work, from this reading on, goes on beside the model's, not after all of it."""
        if self.ready is None:
            yield
            return
        try:
            stream = _idle.pop()
        except IndexError:
            stream = torch.cuda.Stream()
        try:
            stream.wait_event(self.ready)
            with torch.cuda.stream(stream):
                yield
        finally:
            _idle.append(stream)


class Reader:
    """Reads windows at hooks of one language model."""

    def __init__(
        self,
        model: LanguageModel,
        hooks: Mapping[str, int],
        config: HarvestConfig,
        context_size: int,
        on_tokens: Callable[[int], None] = lambda _tokens: None,
        *,
        ahead: int = 0,
    ) -> None:
        """hooks: path -> d_in. on_tokens is called with the number of tokens of each finished forward pass.

        ahead: tokens that will be read, where it is known; if they are many, the model is made faster first.
        """
        self.model, self.hooks, self.config, self.context_size = model, hooks, config, context_size
        self.on_tokens = on_tokens
        if ahead >= PAYS_FROM:
            model.compile()
        self.special = torch.tensor(sorted(model.tokenizer.all_special_ids), dtype=torch.int32)
        self.batch_windows = max(1, self._batch_tokens() // context_size)

    def read(self, windows: Windows, hooks: Sequence[str]) -> Computed:
        """Some of the reader's hooks on these windows."""
        ids, doc = (torch.from_numpy(np.ascontiguousarray(part)) for part in windows)
        rows, device = ids.numel(), self.model.device
        acts = {hook: torch.empty(rows, self.hooks[hook], dtype=torch.bfloat16, device=device) for hook in hooks}
        norms = {hook: torch.empty(rows, dtype=torch.float32, device=device) for hook in hooks}
        start = 0
        while start < len(ids):
            start = self._forward(ids, doc, start, acts, norms)
        codes = position_mask(ids, doc, self.special, mask_first=self.config.mask_first).flatten()
        ready = None
        if device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        return Computed(ids, codes, acts, norms, ready)

    def mask(self, computed: Computed, hook: str, norm: Tensor, first_window: int) -> Tensor:
        """Mask codes [rows] of a hook; norm: [rows] of it, on the CPU.

        StageError where too many rows are not finite; first_window: the number of the first window, to say where.
        """
        mask = row_mask(computed.codes, norm, self.config.outlier_norm)
        bad = (mask == Mask.NONFINITE).nonzero().flatten()
        if len(bad) > MAX_NONFINITE_SHARE * len(mask):
            window, position = divmod(int(bad[0]), self.context_size)
            raise StageError(
                f"{len(bad)} of {len(mask)} activations of '{hook}' are not finite, first at position {position} of "
                f"window {first_window + window}. Harvest with model.dtype float32, or with sdpa attention."
            )
        return mask

    def _forward(self, ids: Tensor, doc: Tensor, start: int, acts: dict[str, Tensor], norms: dict[str, Tensor]) -> int:
        """One pass over the windows from `start`; returns where the next begins. Halves the batch when memory ends."""
        stop = min(start + self.batch_windows, len(ids))
        batch = ids[start:stop].to(self.model.device, torch.long)
        attention = None if not bool((doc[start:stop] == -1).any()) else (doc[start:stop] != -1).long()
        try:
            out = self.model.activations(batch, list(acts), attention_mask=_to(attention, self.model.device))
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.batch_windows == 1:
                raise
            out = None
        if out is None:  # outside the handler, so that what the error's traceback held is free by now
            self.batch_windows = max(1, self.batch_windows // 2)
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            return start
        rows = slice(start * self.context_size, stop * self.context_size)
        for hook, value in out.items():
            flat = value.flatten(0, 1)
            acts[hook][rows].copy_(flat)
            norms[hook][rows].copy_(flat.float().norm(dim=-1))
        self.on_tokens(batch.numel())
        return stop

    def _batch_tokens(self) -> int:
        if self.config.batch_tokens is not None:
            return self.config.batch_tokens
        if self.model.device.type != "cuda":
            return CPU_BATCH_TOKENS
        free, _ = torch.cuda.mem_get_info(self.model.device)
        # Live at once per token: about 32 vectors of d_in (attention, MLP, residual) in bfloat16, and the outputs.
        per_token = 2 * 32 * max(self.hooks.values()) + 4 * sum(self.hooks.values())
        return max(self.context_size, min(GPU_BATCH_TOKENS, int(0.6 * free) // per_token))


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
