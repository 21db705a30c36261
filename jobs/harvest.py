"""The harvest: corpus, then activation blocks. `python -m jobs.harvest CONFIG [--store URI] [--section.key value]`

Ray Data runs language-model actors over leases of window spans. Each actor writes its own blocks and markers to the
store and returns only which spans stand; activations never pass through Ray. A killed actor or driver costs the blocks
that were open; a second run computes nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from jobs.board import Board, Event, watched
from jobs.progress import Bars
from jobs.runtime import Cluster, Slots, last_line, model_slots, own_error, ray_data, ray_session, run_main
from midiscover.config import Dtype
from midiscover.cores import compute_on
from midiscover.corpus import Corpus, CorpusManifest, build_corpus, standing_corpus
from midiscover.errors import MiDiscoverError, StageError
from midiscover.harvest import Harvester, HarvestJob
from midiscover.launch import Prepared, parse_job, prepare
from midiscover.lm import LanguageModel, load_tokenizer
from midiscover.models import ModelIdentity
from midiscover.resolve import Resolved
from midiscover.saes import harvest_lineage
from midiscover.shuffled import shuffle_weights_
from midiscover.store import layout
from midiscover.store.blocks import (
    block_plan,
    commit_tokens,
    committed,
    is_harvested,
    read_manifest,
    write_manifest,
    write_tokens_manifest,
)
from midiscover.store.manifest import BlockSpan
from midiscover.store.storage import Storage

SPANS_PER_LEASE = 8
"""Spans an actor takes at once. Its writer overlaps with the model inside a lease,
 and a kill repeats no block that stands."""
LEASES_PER_ACTOR = 4
"""At least so many, so that actors end together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlace:
    """How a language model is loaded in an actor."""

    identity: ModelIdentity
    dtype: Dtype
    attention: str
    weights: str
    threads: int
    gpu: bool
    cards: int = 1
    """GPUs that the model is spread over."""

    def load(self) -> LanguageModel:
        """Set torch's threads (Ray has set them from the actor's CPUs) and load the model."""
        compute_on(self.threads)
        model = LanguageModel.load(
            self.identity,
            dtype=self.dtype,
            attention=self.attention,
            device="cuda" if self.gpu else "cpu",
            device_map="balanced" if self.cards > 1 else None,
        )
        if self.weights == "shuffled":
            shuffle_weights_(model.model)
        return model


def model_place(resolved: Resolved, slots: Slots) -> ModelPlace:
    """The model of a run on a slot."""
    model = resolved.config.model
    return ModelPlace(
        identity=resolved.model,
        dtype=model.dtype,
        attention=model.attention,
        weights=model.weights,
        threads=slots.threads,
        gpu=slots.gpus > 0,
        cards=max(1, int(slots.gpus)),
    )


class HarvestActor:
    """One language model; takes leases of spans and commits their blocks."""

    def __init__(self, place: ModelPlace, job: HarvestJob, corpus_id: str, storage: Storage, board: Board) -> None:
        self.place, self.job, self.corpus_id, self.storage, self.board = place, job, corpus_id, storage, board
        self.harvester: Harvester | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """One lease in, one row per span out, as it stands."""
        for text in batch["lease"]:
            lease = [(BlockSpan(**item["span"]), item["hooks"]) for item in json.loads(text)]
            # A lease that is tried again was perhaps half done by an actor that died.
            todo = [(span, [hook for hook in hooks if not self._stands(span, hook)]) for span, hooks in lease]
            for span, _rows in self._ready().run([(span, hooks) for span, hooks in todo if hooks]):
                yield {"span": np.array([span.index])}

    def _stands(self, span: BlockSpan, hook: str) -> bool:
        return self.storage.exists(layout.block_marker(self.job.harvest_id, hook, span.index))

    def _ready(self) -> Harvester:
        # Loaded by the first lease: an error here reaches the user as it is, one of a constructor does not.
        if self.harvester is None:
            corpus = Corpus.open(self.storage, self.corpus_id)
            board = self.board
            self.harvester = Harvester(
                self.job,
                self.place.load(),
                corpus,
                self.storage,
                lambda tokens: board.post("tokens", "harvest", tokens),
            )
        return self.harvester


def ensure_corpus(prepared: Prepared, bars: Bars) -> CorpusManifest:
    """The corpus of a run; made on this machine's CPU if it is not committed."""
    resolved, storage = prepared.resolved, prepared.storage
    found = standing_corpus(storage, resolved.corpus_id)
    if found is None:
        began = time.monotonic()
        target = resolved.config.corpus.max_tokens or 0
        found = build_corpus(
            resolved.config.corpus,
            resolved.source,
            load_tokenizer(resolved.model),
            storage,
            resolved.corpus_id,
            lineage={"model": resolved.model.name, "tokenizer": resolved.model.tokenizer_digest},
            progress=lambda tokens: bars.update("corpus", tokens, max(target, tokens), f"{tokens:,} tokens"),
        )
        bars.say(f"corpus made in {time.monotonic() - began:.1f} s")
    bars.say(
        f"corpus {found.id}: {found.tokens['train']:,} training and {found.tokens['held_out']:,} held-out tokens of "
        f"{resolved.source.name}; near-copies dropped: {found.dropped_near_copies}, held-out windows dropped: "
        f"{found.dropped_held_out_windows}, 32-token runs of the held-out text left in training: "
        f"{found.held_out_runs_in_training}"
    )
    return found


def plan_of(resolved: Resolved, corpus: CorpusManifest) -> tuple[BlockSpan, ...]:
    """How every hook of this harvest is cut into blocks."""
    return block_plan(
        corpus.windows["train"],
        corpus.windows["held_out"],
        context_size=corpus.context_size,
        block_tokens=resolved.config.harvest.block_tokens,
    )


def missing_spans(resolved: Resolved, corpus: CorpusManifest, storage: Storage) -> list[tuple[BlockSpan, list[str]]]:
    """Spans with the hooks whose block is not committed there; hooks with a manifest and its blocks miss nothing."""
    plan = plan_of(resolved, corpus)
    done: dict[str, set[int]] = {}
    for hook in resolved.hooks:
        if is_harvested(storage, resolved.harvest_id, hook):
            done[hook] = {span.index for span in plan}
        else:
            done[hook] = set(committed(storage, resolved.harvest_id, hook, take_back=True))
    spans = [(span, [hook for hook in resolved.hooks if span.index not in done[hook]]) for span in plan]
    return [(span, hooks) for span, hooks in spans if hooks]


def harvest(prepared: Prepared, corpus: CorpusManifest, cluster: Cluster, bars: Bars) -> None:
    """Commit every missing block; `commit_manifests` comes after it."""
    resolved, storage = prepared.resolved, prepared.storage
    todo = missing_spans(resolved, corpus, storage)
    if todo:
        slots = model_slots(cluster, resolved.config.resources)
        counter = _TokenCounter(
            bars, sum(span.stop_window - span.start_window for span, _ in todo) * corpus.context_size
        )
        with watched("harvest", counter.on_event, stall_seconds=resolved.config.resources.stall_seconds) as board:
            _run_actors(resolved, storage, todo, slots, board, counter.total // slots.count)
        counter.say()


def commit_manifests(resolved: Resolved, corpus: CorpusManifest, storage: Storage) -> None:
    """Declare every hook harvested, and the tokens they share; needs all blocks of the hooks and no Ray."""
    plan, made_of = plan_of(resolved, corpus), harvest_lineage(resolved)
    # The tokens first: whoever finds a hook's manifest reads them as well.
    if not is_harvested(storage, resolved.harvest_id, layout.TOKENS):
        rows = committed(storage, resolved.harvest_id, layout.TOKENS, take_back=True)
        text = Corpus(storage, corpus)
        for span in plan:
            if span.index not in rows:  # lost where a removal was cut short; they need no model
                ids = torch.from_numpy(text.windows(span.start_window, span.stop_window).ids)
                rows[span.index] = commit_tokens(storage, resolved.harvest_id, span, ids)
        write_tokens_manifest(storage, resolved.harvest_id, plan, rows, lineage=made_of)
    for hook in resolved.hooks:
        if read_manifest(storage, resolved.harvest_id, hook) is None:
            rows = committed(storage, resolved.harvest_id, hook)
            write_manifest(storage, resolved.harvest_id, hook, plan, rows, lineage=made_of)


def _run_actors(
    resolved: Resolved,
    storage: Storage,
    todo: list[tuple[BlockSpan, list[str]]],
    slots: Slots,
    board: Board,
    tokens_each: int,
) -> None:
    data = ray_data()  # here: a run that finds everything there should not wait for it
    shares = slots.count * LEASES_PER_ACTOR if slots.count > 1 else 1
    size = min(SPANS_PER_LEASE, math.ceil(len(todo) / shares))
    items = [{"span": _span_fields(span), "hooks": hooks} for span, hooks in todo]
    leases = [json.dumps(items[i : i + size]) for i in range(0, len(items), size)]
    job = HarvestJob(
        harvest_id=resolved.harvest_id,
        hooks=resolved.hooks,
        config=resolved.config.harvest,
        tokens=tokens_each,
    )
    rows = data.from_items([{"lease": lease} for lease in leases], override_num_blocks=len(leases)).map_batches(
        HarvestActor,
        fn_constructor_kwargs={
            "place": model_place(resolved, slots),
            "job": job,
            "corpus_id": resolved.corpus_id,
            "storage": storage,
            "board": board,
        },
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(slots.count, len(leases))),
        num_cpus=slots.cpus,
        num_gpus=slots.gpus,
    )
    try:
        stand = sum(1 for _ in rows.iter_rows())
    except Exception as error:
        raise own_error(error) or StageError(f"The harvest failed: {last_line(error)}") from error
    if stand > len(todo):
        raise StageError(f"The harvest reported {stand} spans where {len(todo)} were missing.")


class _TokenCounter:
    """Tokens of all actors as one bar."""

    def __init__(self, bars: Bars, total: int) -> None:
        self.bars, self.total = bars, total
        self.tokens = 0
        self.began = time.monotonic()
        self.first: float | None = None
        self.last = self.began
        bars.update("harvest", 0, total, "starting the language model")

    def on_event(self, event: Event) -> bool:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.tokens += event.data
        rate = self.tokens / max(self.last - self.began, 1e-9)
        self.bars.update("harvest", min(self.tokens, self.total), self.total, f"{self.tokens:,} tokens, {rate:,.0f}/s")
        # Actors that die again and again at one place go on computing, but not on moving.
        return self.tokens <= 2 * self.total

    def say(self) -> None:
        seconds = time.monotonic() - self.began
        start = (self.first or self.last) - self.began
        self.bars.say(
            f"{self.tokens:,} tokens in {seconds:.1f} s, of which {start:.1f} s until the first batch was done "
            f"({self.tokens / max(seconds, 1e-9):,.0f} tokens/s in all)"
        )


def _span_fields(span: BlockSpan) -> Mapping[str, Any]:
    return {
        "index": span.index,
        "split": span.split,
        "start_window": span.start_window,
        "stop_window": span.stop_window,
    }


def forget(prepared: Prepared) -> None:
    """Remove the committed blocks of this run's hooks, for --force."""
    for hook in prepared.resolved.hooks:
        # What makes others believe in a file goes before the file: manifest, then markers, then blocks.
        prepared.storage.delete(layout.hook_manifest(prepared.resolved.harvest_id, hook))
        keys = prepared.storage.list(layout.hook_folder(prepared.resolved.harvest_id, hook))
        for key in sorted(keys, key=lambda key: not key.endswith(".json")):
            prepared.storage.delete(key)


def main(argv: list[str]) -> int:
    """Run the stage; returns the exit code."""
    with prepare(parse_job("harvest", argv)) as prepared, Bars("harvest") as bars:
        storage = prepared.storage
        parts = [replace(prepared, resolved=part) for part in prepared.resolved.parts()]
        if prepared.args.force:
            for part in parts:
                forget(part)
        corpus = ensure_corpus(prepared, bars)
        if any(missing_spans(part.resolved, corpus, storage) for part in parts):
            with ray_session(prepared.resolved.config.resources.nodes, bars.say) as cluster:
                for part in parts:
                    harvest(part, corpus, cluster, bars)
        else:
            bars.say("every block is committed; the model is not run")
        for part in parts:
            commit_manifests(part.resolved, corpus, storage)
            _say_rows(part.resolved, storage, bars)
    for part in parts:
        print(f"{storage.uri}/{layout.harvest_folder(part.resolved.harvest_id)}")
    return 0


def _say_rows(resolved: Resolved, storage: Storage, bars: Bars) -> None:
    for hook in resolved.hooks:
        manifest = read_manifest(storage, resolved.harvest_id, hook)
        if manifest is None:
            raise MiDiscoverError(f"The harvest of '{hook}' has no manifest.")
        bars.say(f"{hook}: {manifest.rows:,} rows x {manifest.d_in}, left out {_masked(manifest.masked)}")


def _masked(masked: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in masked.items() if count) or "none"


if __name__ == "__main__":
    run_main(main)
