"""Token windows into activation blocks of many hooks, one forward pass for all. Knows no Ray.

A span of windows becomes one block per hook. Blocks are written by a background thread while the next span runs;
whatever is committed already is not computed again.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from midiscover.config import HarvestConfig
from midiscover.corpus import Corpus
from midiscover.lm import LanguageModel
from midiscover.reading import Computed, Reader
from midiscover.store import layout
from midiscover.store.blocks import commit_block, commit_tokens
from midiscover.store.manifest import BlockRow, BlockSpan
from midiscover.store.storage import Storage

MAX_WRITERS = 8
OPEN_SPANS = 2
"""Spans whose blocks wait for the writer; bounds host memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestJob:
    """What one actor needs to know besides its model."""

    harvest_id: str
    hooks: Mapping[str, int]
    """Hook path -> d_in."""
    config: HarvestConfig
    tokens: int = 0
    """About how many this actor will read."""


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
        self.job, self.corpus, self.storage = job, corpus, storage
        self.on_gpu = model.device.type == "cuda"
        context_size = corpus.manifest.context_size
        self.reader = Reader(model, job.hooks, job.config, context_size, on_tokens, ahead=job.tokens)

    def run(self, todo: Sequence[tuple[BlockSpan, Sequence[str]]]) -> Iterator[tuple[BlockSpan, dict[str, BlockRow]]]:
        """Commit the blocks of each (span, hooks still missing there); yields a span once its blocks stand."""
        # A GPU outruns one writer, which hashes 25 kB a token of phi-2; a CPU has no core to spare for more.
        writers = OPEN_SPANS if self.on_gpu else 1
        quick = _quick_switches() if self.on_gpu else nullcontext()
        with quick, ThreadPoolExecutor(max_workers=writers, thread_name_prefix="block-writer") as writer:
            waiting: deque[tuple[BlockSpan, Future[dict[str, BlockRow]]]] = deque()
            for span, hooks in todo:
                windows = self.corpus.windows(span.start_window, span.stop_window)
                computed = self.reader.read(windows, hooks)
                waiting.append((span, writer.submit(self._write, span, computed)))
                while len(waiting) > OPEN_SPANS or (waiting and waiting[0][1].done()):
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()

    def _write(self, span: BlockSpan, computed: Computed) -> dict[str, BlockRow]:
        if not self.storage.exists(layout.block_marker(self.job.harvest_id, layout.TOKENS, span.index)):
            commit_tokens(self.storage, self.job.harvest_id, span, computed.ids)
        threads = min(len(computed.acts), MAX_WRITERS) if self.on_gpu else 1
        with ThreadPoolExecutor(threads) as pool:
            rows = pool.map(lambda hook: self._write_hook(span, hook, computed), computed.acts)
            return dict(zip(computed.acts, rows, strict=True))

    def _write_hook(self, span: BlockSpan, hook: str, computed: Computed) -> BlockRow:
        with computed.beside():
            norm = computed.norms[hook].cpu()
            mask = self.reader.mask(computed, hook, norm, span.start_window)
            return commit_block(self.storage, self.job.harvest_id, hook, span, computed.acts[hook], norm, mask)


@contextmanager
def _quick_switches() -> Iterator[None]:
    """In the body Python's threads take turns ten times as often as by default.

    One launches the kernels of a pass and must not wait 5 ms for each writer: 9 % more tokens/s of phi-2 on an H200.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
