"""What a sweep does with its activations: as it is told, or as the planner finds, and the same in every later run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jobs.harvest import ensure_corpus
from jobs.nodes import Node
from jobs.runtime import Cluster
from jobs.ways import streams_activations
from midiscover.corpus import CorpusManifest
from midiscover.errors import ConfigError
from midiscover.launch import Prepared
from midiscover.rates import Rates, StepCost, write_rates
from midiscover.saeconfig import SAE_KINDS
from midiscover.store import layout
from tests.runs import prepared_sweep, write_run

MACHINE = Cluster(local=True, cores=2, nodes=(Node(4, 0),))


class Silent:
    def update(self, *_: Any) -> None: ...

    def say(self, text: str) -> None: ...


def rates(write: float) -> Rates:
    return Rates(
        device="CPU", measured="2026-11-26T00:00:00+00:00", model_dtype="float32", train_dtype="float32",
        model_flops=1e9, logits_flops=1e9, load_bytes=1e9, tokenise=1e6, encode=1e-11, write=write, read=write,
        steps=dict.fromkeys(SAE_KINDS, StepCost(1e-9, 1e-11, 1e-10)),
        starts=dict.fromkeys(("driver", "ray", "worker", "trial", "figures"), 0.0),
    )  # fmt: skip


def run(folder: Path, activations: str, **changes: object) -> tuple[Prepared, CorpusManifest]:
    path = write_run(folder, resources={"activations": activations}, **changes)
    prepared = prepared_sweep(path, folder / "store")
    return prepared, ensure_corpus(prepared, Silent())  # type: ignore[arg-type]


def streams(prepared: Prepared, corpus: CorpusManifest, told: list[str]) -> bool:
    return streams_activations(prepared.resolved, prepared.storage, corpus, MACHINE, told.append)


def test_what_was_found_quicker_first_stays(tmp_path: Path) -> None:
    prepared, corpus = run(tmp_path, "auto")
    told: list[str] = []
    write_rates(prepared.storage, rates(write=1e3))
    assert streams(prepared, corpus, told)
    assert told[0].startswith("resources.activations auto: store would take")
    assert told[0].endswith("; stream it is")
    write_rates(prepared.storage, rates(write=1e12))
    assert streams(prepared, corpus, told)
    assert len(told) == 1


def test_what_no_node_holds_is_not_streamed_however_quick(tmp_path: Path) -> None:
    places = ["", ":in", ".mlp", ".mlp:in"]  # whose rows, all together, are 13 MB; those of one hook are 1 MB
    hooks = {"hooks": [f"model.layers.{{0,1,2}}{place}" for place in places], "block_tokens": 1024}
    prepared, corpus = run(tmp_path, "auto", harvest=hooks)
    told: list[str] = []
    write_rates(prepared.storage, rates(write=1e3))
    nodes = (Node(4, 0, 1e12), Node(4, 0, 1e7))
    cluster = dataclasses.replace(MACHINE, nodes=nodes)
    assert not streams_activations(prepared.resolved, prepared.storage, corpus, cluster, told.append)
    assert told[0].endswith("; store it is")
    (line,) = [line for line in told if "of RAM" in line]
    assert line.startswith("activations: stream takes 0.0 GB of RAM, and there are 0.0 here")


def test_rates_of_another_precision_are_said_to_be_so(tmp_path: Path) -> None:
    prepared, corpus = run(tmp_path, "auto")
    told: list[str] = []
    write_rates(prepared.storage, dataclasses.replace(rates(write=1e3), train_dtype="bfloat16"))
    assert streams(prepared, corpus, told)
    assert told[1].startswith("these rates are those of train.dtype bfloat16, and the run has float32")


def test_without_rates_activations_are_stored_and_it_is_said(tmp_path: Path) -> None:
    told: list[str] = []
    assert not streams(*run(tmp_path, "auto"), told)
    assert "`midiscover calibrate` measures them" in told[0]


@pytest.mark.parametrize("asked", ["store", "stream"])
def test_what_is_asked_for_is_done(tmp_path: Path, asked: str) -> None:
    assert streams(*run(tmp_path, asked), []) == (asked == "stream")


def test_a_stream_of_several_epochs_that_fits_no_pool_is_refused(tmp_path: Path) -> None:
    prepared, corpus = run(tmp_path, "stream", train={"epochs": 2, "batch_size": 128, "shuffle_tokens": 5000})
    with pytest.raises(ConfigError, match="resources.activations is stream, but train.epochs is 2, and"):
        streams(prepared, corpus, [])


@pytest.mark.parametrize("name", ["workers", "gpus_per_model"])
def test_a_stream_that_no_process_can_have_alone_is_refused(tmp_path: Path, name: str) -> None:
    flags = ["--resources.activations", "stream", f"--resources.{name}", "2"]
    with pytest.raises(ConfigError, match=f"resources.{name} must be 1 where resources.activations is stream"):
        prepared_sweep(write_run(tmp_path), tmp_path / "store", *flags)


def test_a_run_makes_a_corpus_again_whose_shards_are_gone(tmp_path: Path) -> None:
    prepared, corpus = run(tmp_path, "store")
    storage = prepared.storage
    before = storage.list("corpora")
    storage.delete(layout.corpus_file(corpus.id, corpus.shards[0].file))
    assert ensure_corpus(prepared, Silent()) == corpus  # type: ignore[arg-type]
    assert storage.list("corpora") == before
