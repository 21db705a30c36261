"""How fast this device does what a run consists of: a language model's passes, SAE steps, the store. Knows no Ray.

Everything is measured on the code that a run takes, for seconds each: it tells a plan's rates, not a card's peak.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midiscover import lineage
from midiscover.config import CorpusConfig, TrainConfig
from midiscover.cores import SMALL_BELOW
from midiscover.corpus import build_corpus
from midiscover.evaluate import divergence_, log_probabilities, reconstruction_metrics
from midiscover.lm import LanguageModel
from midiscover.models import HookTable
from midiscover.progress import Progress
from midiscover.rates import Rates, StepCost
from midiscover.reading import CPU_BATCH_TOKENS
from midiscover.sae.base import Normalisation
from midiscover.sae.registry import make_sae
from midiscover.saeconfig import SAE_KINDS, PenaltyConfig, SaeConfig, StandardConfig, TopKConfig
from midiscover.sidebyside import MOST_STEPS
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Storage
from midiscover.texts import resolve_source
from midiscover.train import Member, Pair, train

STILL = 1e-7
"""Learning rate with which an SAE stays at the L0 that it begins with."""
NEVER = 10**12
"""Tokens without firing after which a feature counts as dead."""
BATCHES = (1024, 4096)
L0S = (60, 240)
STEPS, UNCOUNTED = 5, 1
"""Of each training, and how many of the first are not counted."""
STEPS_SIDE_BY_SIDE = 1 + MOST_STEPS
"""The same where cores step an SAE each: the first is reported, and the rest is taken at once."""
STEPS_ON_GPU, UNCOUNTED_ON_GPU = 24, 8
"""The same on a GPU, where the first compile kernels and record the step."""
CORPUS_TOKENS = 40_000
LOGITS_WINDOWS = 4
PROBE_BYTES = 64 << 20


class Shape(NamedTuple):
    """Of the SAEs that are stepped."""

    d_in: int
    d_sae: int


def measure(
    lm: LanguageModel,
    table: HookTable,
    hook: str,
    storage: Storage,
    *,
    shape: Shape,
    settings: TrainConfig,
    model_dtype: str,
    load_seconds: float,
    starts: Mapping[str, float],
) -> Rates:
    """Rates of the device that `lm` is on.

    hook: to which the model is run, where that takes any time; settings: whose precision the steps have; model_dtype:
    that of `lm`; load_seconds: what loading it took; starts: see `Rates`.
    """
    device = lm.device
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    model_flops, logits_flops = _passes(lm, table, hook)
    write, read = _store(storage)
    return Rates(
        device=name,
        measured=lineage.now(),
        threads=torch.get_num_threads(),
        model_dtype=model_dtype,
        train_dtype=settings.dtype,
        model_flops=model_flops,
        logits_flops=logits_flops,
        load_bytes=2 * table.parameters / load_seconds,
        tokenise=_tokenise(lm),
        steps={kind: step_cost(kind, shape, settings, device) for kind in SAE_KINDS},
        encode=_encode(shape, device),
        write=write,
        read=read,
        starts=starts,
        memory=None if device.type == "cpu" else float(torch.cuda.get_device_properties(device).total_memory),
    )


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, a GPU's queue emptied before and after."""
    _settle(device)
    began = time.perf_counter()
    work()
    _settle(device)
    return time.perf_counter() - began


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _passes(lm: LanguageModel, table: HookTable, hook: str) -> tuple[float, float]:
    """FLOP/s of a pass to `hook`, and of one to the end with cross-entropy and KL."""
    if not table.require(hook).flops_per_token:  # before the first product: embeddings, and the norm after them
        hook = [path for path, one in table.hooks.items() if one.recommended][-1]
    vocabulary = min(table.vocab_size, 10_000)
    ids = torch.randint(vocabulary, (CPU_BATCH_TOKENS // 128, 128), generator=torch.Generator().manual_seed(0))
    lm.activations(ids[:4], [hook])
    seconds = timed(lambda: lm.activations(ids, [hook]), lm.device)
    model = ids.numel() * table.require(hook).flops_per_token / seconds
    few = ids[:LOGITS_WINDOWS].to(lm.device)
    counted = torch.ones(len(few), few.shape[1] - 1, dtype=torch.bool, device=lm.device)

    def to_the_end() -> None:
        for log_p in log_probabilities(lm.logits(few, replace={hook: lambda value: value}), counted):
            divergence_(log_p, log_p.clone())

    to_the_end()
    seconds = statistics.median(timed(to_the_end, lm.device) for _ in range(3))
    return model, few.numel() * table.flops_per_token / seconds


def step_cost(kind: str, shape: Shape, settings: TrainConfig, device: torch.device) -> StepCost:
    """What a step of a kind costs: three trainings at two batch sizes and two L0s, and the plane through them."""
    (small, large), (few, many) = BATCHES, L0S
    rows = 2 * shape.d_in
    first, second, third = (
        _step_seconds(_config(kind, shape, l0), shape, replace(settings, batch_size=batch), device) / rows
        for batch, l0 in ((small, few), (large, few), (large, many))
    )
    active = max(0.0, third - second) / (large * (many - few))
    token = max(0.0, (second - first) / (large - small) - active * few) / shape.d_sae
    weight = max(0.0, first - small * (token * shape.d_sae + active * few)) / shape.d_sae
    return StepCost(weight=weight, token=token, active=active)


def _config(kind: str, shape: Shape, l0: int) -> SaeConfig:
    config = SAE_KINDS[kind](d_sae=shape.d_sae)
    if isinstance(config, TopKConfig):
        return replace(config, k=min(l0, shape.d_sae // 2))
    if isinstance(config, PenaltyConfig):
        return replace(config, initial_density=min(0.5, l0 / shape.d_sae))
    return config


class _Rows:
    """The same random rows again and again, as `midiscover.train.Source`; notes when each batch is asked for."""

    def __init__(self, d_in: int, batch_size: int, device: torch.device, *, steps: int, pairs: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(batch_size, d_in, generator=generator).to(device)
        self.inputs = self.outputs = Normalisation(torch.zeros(d_in), 1.0, float(d_in))
        self.steps = steps
        self.batch_size, self.rows_per_epoch = batch_size, batch_size * steps
        self.device, self.pairs = device, pairs
        self.asked: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def batches(self, start: int) -> Iterator[Tensor | Pair]:
        """See `Source`."""
        for _ in range(start, self.steps):
            _settle(self.device)
            self.asked.append(time.perf_counter())
            yield Pair(self.rows, self.rows) if self.pairs else self.rows
        _settle(self.device)
        self.asked.append(time.perf_counter())


class Nobody:
    """A worker that keeps nothing and tells nobody."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def load_checkpoint(self, read: object) -> None:
        """None."""

    def save_checkpoint(self, step: int, data: bytes) -> None:
        """Not reached."""

    def is_saving(self) -> bool:
        """No."""
        return False

    def report(self, progress: Progress) -> None:
        """Nobody looks."""


def _step_seconds(config: SaeConfig, shape: Shape, settings: TrainConfig, device: torch.device) -> float:
    """Of one SAE's step; of as many SAEs as there are cores, where a sweep would step them side by side."""
    still = replace(settings, lr=STILL, epochs=1, report_every=10**6, checkpoint_every=1e9, retire_after=None)
    still = replace(still, dead_window=NEVER)  # a share of so few steps is less than one
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    side_by_side = threads > 1 and still.batch_size * shape.d_in * shape.d_sae < SMALL_BELOW
    steps = STEPS_ON_GPU if device.type == "cuda" else STEPS_SIDE_BY_SIDE if side_by_side else STEPS
    source = _Rows(shape.d_in, still.batch_size, device, steps=steps, pairs="transcoder" in config.kind)
    count = threads if side_by_side else 1
    members = [Member(id=str(i), config=config, train=still, d_sae=shape.d_sae) for i in range(count)]
    train(members, source, Nobody(device), threads=threads)
    asked = source.asked[UNCOUNTED_ON_GPU if device.type == "cuda" else UNCOUNTED :]
    if side_by_side:
        return (asked[-1] - asked[0]) / (len(asked) - 1) / count
    return statistics.median(end - begin for begin, end in pairwise(asked))


def _encode(shape: Shape, device: torch.device) -> float:
    """Seconds for each weight and token of a held-out evaluation."""
    config = StandardConfig(d_sae=shape.d_sae, initial_density=L0S[0] / shape.d_sae)
    sae: Any = make_sae(config, shape.d_in, shape.d_sae, shape.d_in)
    sae.initialise_(0)
    sae.to(device)
    rows = torch.randn(BATCHES[-1], shape.d_in, generator=torch.Generator().manual_seed(0)).to(device)
    sae.calibrate_(rows)
    mean = torch.zeros(shape.d_in)
    reconstruction_metrics({"probe": sae}, [rows], mean)
    seconds = timed(lambda: reconstruction_metrics({"probe": sae}, [rows, rows], mean), device)
    return seconds / (2 * len(rows) * 2 * shape.d_in * shape.d_sae)


def _store(storage: Storage) -> tuple[float, float]:
    """Bytes/s to and from the store; nothing is left."""
    key = layout.rates(f"probe-{secrets.token_hex(4)}")
    data = secrets.token_bytes(PROBE_BYTES)
    cpu = torch.device("cpu")
    try:
        written = timed(lambda: storage.write(key, data), cpu)
        read = timed(lambda: storage.read(key), cpu)
    finally:
        storage.delete(key)
    return len(data) / written, len(data) / read


def _tokenise(lm: LanguageModel) -> float:
    """Tokens/s in which a corpus is made of the built-in text."""
    config = CorpusConfig(max_tokens=CORPUS_TOKENS, held_out=0.5)  # both splits get a document, however few there are
    source = resolve_source(config)
    with tempfile.TemporaryDirectory(prefix="midiscover-") as folder:
        storage = LocalStorage(Path(folder))
        cpu = torch.device("cpu")
        seconds = timed(lambda: build_corpus(config, source, lm.tokenizer, storage, "c.calibrate", lineage={}), cpu)
    return CORPUS_TOKENS / seconds
