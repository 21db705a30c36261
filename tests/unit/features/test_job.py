"""What the features job harvests again before it reads, without a Ray."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import jobs.features
from jobs.board import Event
from jobs.features import ANNOUNCE_SECONDS, FeaturesRun, Site
from midiscover.config import ResourcesConfig
from midiscover.launch import Prepared, TargetArgs
from midiscover.saes import harvest_lineage, read_from
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from tests.runs import prepared_sweep, write_run


class Silent:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_one_pass_of_each_language_model_for_all_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepared_sweep(write_run(tmp_path, grid=[{"sae.control": ["none", "random_model"]}]), tmp_path / "store")
    run = FeaturesRun.__new__(FeaturesRun)
    run.args, run.bars, run.storage = TargetArgs(target="tiny"), Silent(), prepared.storage  # type: ignore[assignment]
    run.resources, run.records = ResourcesConfig(threads=1), {}
    sites: dict[Site, list[str]] = {}
    for sae in prepared.resolved.saes:
        part = prepared.resolved.part_of(sae)
        config, lineage = read_from(part, (sae.point.hook, sae.output_hook)), harvest_lineage(part)
        run.records[sae.id] = {"id": sae.id, "hook": sae.point.hook, "config": config, "lineage": lineage}
        sites.setdefault(Site(part.harvest_id, part.corpus_id, sae.point.hook), []).append(sae.id)
    assert len(sites) == 4
    passes: list[tuple[str, set[str]]] = []

    def harvest(asked: Prepared, *_: Any) -> None:
        words = run.storage.list(layout.harvest_readers(asked.resolved.harvest_id))
        assert words, "before it is looked for"
        for word in words:
            os.utime(tmp_path / "store" / word, (0, 0))  # as after days
        passes.append((asked.resolved.harvest_id, set(asked.resolved.hooks)))

    monkeypatch.setattr(jobs.features, "harvest", harvest)
    monkeypatch.setattr(jobs.features, "ensure_corpus", lambda *_: None)
    monkeypatch.setattr(jobs.features, "commit_manifests", lambda *_: None)
    ages: list[float] = []

    def collect(*_: Any) -> None:
        for part in prepared.resolved.parts():
            words = run.storage.entries(layout.harvest_readers(part.harvest_id))
            ages.extend(time.time() - word.modified for word in words)

    monkeypatch.setattr(run, "_collect", collect)
    run._read(sites, {}, None)  # type: ignore[arg-type]
    hooks = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert passes == [(part.harvest_id, hooks) for part in prepared.resolved.parts()]
    assert len(ages) == 2
    assert max(ages) < 3600, "said anew after the harvest"
    assert not [
        word for part in prepared.resolved.parts() for word in run.storage.list(layout.harvest_readers(part.harvest_id))
    ]


def test_who_reads_for_days_says_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], []
    monkeypatch.setattr(jobs.features.time, "monotonic", lambda: now[0])
    bars: Any = SimpleNamespace(update=lambda *_: None)
    rows = jobs.features._Rows(bars, 10**6, lambda: said.append(now[0]))
    for now[0] in range(0, 3 * ANNOUNCE_SECONDS, 600):
        rows.on_event(Event("tokens", "actor", 10))
    assert said == [ANNOUNCE_SECONDS + 600, 2 * (ANNOUNCE_SECONDS + 600)]


def test_what_was_said_of_features_outlives_force(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    run = FeaturesRun.__new__(FeaturesRun)
    run.storage, run.target, run.run = storage, SimpleNamespace(saes=["sae"]), SimpleNamespace(features_id="f.a")  # type: ignore[assignment]
    said = layout.explanations("sae", "f.a", "some-model", 0)
    for key in (layout.features_manifest("sae", "f.a"), layout.features_file("sae", "f.a", "features.parquet"), said):
        storage.write(key, b"x")
    run._forget()
    assert storage.list("saes") == [said]
