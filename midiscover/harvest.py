"""Token windows into activation blocks of many hooks, one forward pass for all. Knows no Ray.

A span of windows becomes one block per hook. Blocks are written by a background thread while the next span runs;
whatever is committed already is not computed again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from midiscover.config import HarvestConfig
from midiscover.corpus import Corpus
from midiscover.errors import StageError
from midiscover.lm import LanguageModel
from midiscover.store import layout
from midiscover.store.blocks import Mask, commit_block, commit_tokens
from midiscover.store.manifest import BlockRow, BlockSpan
from midiscover.store.storage import Storage

MAX_NONFINITE_SHARE = 0.001
CPU_BATCH_TOKENS = 4096
"""Fixed on CPU: the last bits of a matrix product depend on the batch's shape, and blocks are promised bit for bit."""
GPU_BATCH_TOKENS = 16_384
MAX_WRITERS = 8
OPEN_SPANS = 2
"""Spans whose blocks wait for the writer; bounds host memory."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestJob:
    """What one actor needs to know besides its model."""

    harvest_id: str
    hooks: Mapping[str, int]
    """Hook path -> d_in."""
    config: HarvestConfig


class Harvester:
    """Runs a language model over spans of windows and commits their blocks."""

    def __init__(
        self,
        job: HarvestJob,
        model: LanguageModel,
        corpus: Corpus,
        storage: Storage,
        on_tokens: Callable[[int], None] = lambda _tokens: None,
    ) -> None:
        """on_tokens is called with the number of tokens of each finished forward pass."""
        self.job, self.model, self.corpus, self.storage = job, model, corpus, storage
        self.on_tokens = on_tokens
        self.special = torch.tensor(sorted(model.tokenizer.all_special_ids), dtype=torch.int32)
        self.context_size = corpus.manifest.context_size
        self.batch_windows = max(1, self._batch_tokens() // self.context_size)

    def run(self, todo: Sequence[tuple[BlockSpan, Sequence[str]]]) -> Iterator[tuple[BlockSpan, dict[str, BlockRow]]]:
        """Commit the blocks of each (span, hooks still missing there); yields a span once its blocks stand."""
        # A GPU outruns one writer, which hashes 25 kB a token of phi-2; a CPU has no core to spare for more.
        writers = OPEN_SPANS if self.model.device.type == "cuda" else 1
        with ThreadPoolExecutor(max_workers=writers, thread_name_prefix="block-writer") as writer:
            waiting: deque[tuple[BlockSpan, Future[dict[str, BlockRow]]]] = deque()
            for span, hooks in todo:
                computed = self._compute(span, hooks)
                waiting.append((span, writer.submit(self._write, span, computed)))
                while len(waiting) > OPEN_SPANS or (waiting and waiting[0][1].done()):
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()

    def _compute(self, span: BlockSpan, hooks: Sequence[str]) -> _Computed:
        """The activations of a span, on the model's device, which may still be at work on them."""
        ids_np, doc_np = self.corpus.windows(span.start_window, span.stop_window)
        ids, doc = torch.from_numpy(np.ascontiguousarray(ids_np)), torch.from_numpy(np.ascontiguousarray(doc_np))
        rows, device = ids.numel(), self.model.device
        acts = {hook: torch.empty(rows, self.job.hooks[hook], dtype=torch.bfloat16, device=device) for hook in hooks}
        norms = {hook: torch.empty(rows, dtype=torch.float32, device=device) for hook in hooks}
        start = 0
        while start < len(ids):
            start = self._forward(ids, doc, start, acts, norms)
        codes = position_mask(ids, doc, self.special, mask_first=self.job.config.mask_first).flatten()
        ready = None
        if device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        return _Computed(ids, codes, acts, norms, ready)

    def _forward(self, ids: Tensor, doc: Tensor, start: int, acts: dict[str, Tensor], norms: dict[str, Tensor]) -> int:
        """One pass over the windows from `start`; returns where the next begins. Halves the batch when memory ends."""
        stop = min(start + self.batch_windows, len(ids))
        batch = ids[start:stop].to(self.model.device, torch.long)
        attention = None if not bool((doc[start:stop] == -1).any()) else (doc[start:stop] != -1).long()
        try:
            out = self.model.activations(batch, list(acts), attention_mask=_to(attention, self.model.device))
        except RuntimeError as error:
            if not _out_of_memory(error) or self.batch_windows == 1:
                raise
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

    def _write(self, span: BlockSpan, computed: _Computed) -> dict[str, BlockRow]:
        if not self.storage.exists(layout.block_marker(self.job.harvest_id, layout.TOKENS, span.index)):
            commit_tokens(self.storage, self.job.harvest_id, span, computed.ids)
        threads = min(len(computed.acts), MAX_WRITERS) if self.model.device.type == "cuda" else 1
        with ThreadPoolExecutor(threads) as pool:
            rows = pool.map(lambda hook: self._write_hook(span, hook, computed), computed.acts)
            return dict(zip(computed.acts, rows, strict=True))

    def _write_hook(self, span: BlockSpan, hook: str, computed: _Computed) -> BlockRow:
        with self._beside(computed.ready):
            norm = computed.norms[hook].cpu()
            mask = row_mask(computed.codes, norm, self.job.config.outlier_norm)
            self._refuse_nonfinite(hook, span, mask)
            return commit_block(self.storage, self.job.harvest_id, hook, span, computed.acts[hook], norm, mask)

    def _beside(self, ready: torch.cuda.Event | None) -> contextlib.AbstractContextManager[object]:
        """In the body a GPU's work, from this event on, goes on beside the model's, not after all of it."""
        if ready is None:
            return contextlib.nullcontext()
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_event(ready)
        return torch.cuda.stream(stream)

    def _refuse_nonfinite(self, hook: str, span: BlockSpan, mask: Tensor) -> None:
        bad = (mask == Mask.NONFINITE).nonzero().flatten()
        if len(bad) > MAX_NONFINITE_SHARE * len(mask):
            window, position = divmod(int(bad[0]), self.context_size)
            raise StageError(
                f"{len(bad)} of {len(mask)} activations of '{hook}' are not finite, first at position {position} of "
                f"window {span.start_window + window}. Harvest with model.dtype float32, or with sdpa attention."
            )

    def _batch_tokens(self) -> int:
        if self.job.config.batch_tokens is not None:
            return self.job.config.batch_tokens
        if self.model.device.type != "cuda":
            return CPU_BATCH_TOKENS
        free, _ = torch.cuda.mem_get_info(self.model.device)
        # Live at once per token: about 32 vectors of d_in (attention, MLP, residual) in bfloat16, and the outputs.
        per_token = 2 * 32 * max(self.job.hooks.values()) + 4 * sum(self.job.hooks.values())
        return max(self.context_size, min(GPU_BATCH_TOKENS, int(0.6 * free) // per_token))


class _Computed(NamedTuple):
    ids: Tensor
    codes: Tensor
    acts: dict[str, Tensor]
    norms: dict[str, Tensor]
    ready: torch.cuda.Event | None
    """After it both are what they say; None on a CPU, where they are at once."""


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
