"""What a sweep writes of itself before it does anything, and what others may do to its activations then. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import stopwatch, sweeprun
from jobs.stopwatch import Stopwatch
from jobs.sweeprun import SweepRun
from midiscover.corpus import find_corpus
from midiscover.errors import ConfigError, CorruptError, StoreFailedError
from midiscover.launch import parse_job, prepare
from midiscover.results import Results
from midiscover.sae.l0control import APPROACH
from midiscover.saeconfig import LONGEST_WARMUP
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker
from midiscover.tracking.annotations import read_annotations
from midiscover.upkeep import spent_activations, survey
from tests.runs import write_run

GRID = [{"sae.control": ["none", "random_model"]}]


class Silent:
    def say(self, text: str) -> None: ...

    def update(self, *_: object) -> None: ...


def started(config: Path, store: Path, *flags: str) -> SweepRun:
    """A sweep whose driver was killed before its first SAE was done."""
    with prepare(parse_job("sweep", [str(config), "--store", str(store), *flags])) as prepared:
        run = SweepRun(prepared, Silent(), None)  # type: ignore[arg-type]
        run._start()
    return run


def sweep_json(run: SweepRun) -> dict[str, Any]:
    return json.loads(run.storage.read(layout.sweep_record(run.id)))


def test_a_resampling_before_which_nothing_can_be_dead_is_refused_before_a_harvest(tmp_path: Path) -> None:
    config = write_run(tmp_path, train={"batch_size": 128, "resample_at": [0.3], "dead_window": 24_000})
    run = started(config, tmp_path / "store")
    with pytest.raises(
        ConfigError, match=r"^train.dead_window is 24000, more than the \d+ rows before the last of tra"
    ):
        run.run()
    corpus = find_corpus(run.storage, run.resolved.corpus_id)
    assert corpus is not None
    assert run.storage.list(layout.ACTIVATIONS) == []
    for sae in run.resolved.saes:
        run.storage.write(layout.training(sae.id), b"{}")
    run._check_resampling(run._untrained(), corpus)  # what has been trained so stands


def test_a_warm_up_leaves_time_for_the_l0_that_is_asked_for(tmp_path: Path) -> None:
    """And where none is asked for it may be as long as the run. What has been trained so stands, unless by --force."""
    assert LONGEST_WARMUP + APPROACH < 1
    place = tmp_path / "store"

    def sweep(warmup: float, *flags: str, **sae: object) -> SweepRun:
        config = write_run(tmp_path, sae={"d_sae": 96} | sae, train={"l1_warmup": warmup}, grid={})
        with prepare(parse_job("sweep", [str(config), "--store", str(place), *flags])) as prepared:
            return SweepRun(prepared, Silent(), None)  # type: ignore[arg-type]

    sentence = r"^train.l1_warmup is 0.5, .* for sae.target_l0, steered to after it: take 0.4 at most"
    for kind in ("standard", "gated", "jumprelu"):
        run = sweep(0.5, kind=kind, target_l0=9)
        before = run.storage.list("")
        with pytest.raises(ConfigError, match=sentence):
            run.run()
        assert run.storage.list("") == before
        for sae in run.resolved.saes:
            run.storage.write(layout.training(sae.id), b"{}")
        run._check_warmup()
        with pytest.raises(ConfigError, match=sentence):
            sweep(0.5, "--force", kind=kind, target_l0=9).run()
        assert all(run.storage.exists(layout.training(sae.id)) for sae in run.resolved.saes)
    sweep(LONGEST_WARMUP, target_l0=9)._check_warmup()
    sweep(1.0)._check_warmup()
    sweep(1.0, kind="topk", k=9)._check_warmup()


def test_a_finished_sae_is_asked_for_once_by_what_a_force_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(write_run(tmp_path), tmp_path / "store")
    for sae in run.resolved.saes:
        run.storage.write(layout.training(sae.id), b"{}")
        run.storage.write(layout.record(sae.id), b"{}")
    asked: list[str] = []
    real = LocalStorage.exists
    monkeypatch.setattr(LocalStorage, "exists", lambda self, key: asked.append(key) or real(self, key))
    run._end_forgetting()
    assert asked == [layout.record(sae.id) for sae in run.resolved.saes]


def test_the_harvests_of_a_running_sweep_are_kept_from_others(tmp_path: Path) -> None:
    """Those of both language models, though no record names any yet."""
    config, store = write_run(tmp_path, grid=GRID, harvest={"hooks": "model.layers.0.mlp"}), tmp_path / "store"
    done = started(config, store, "--name", "done", "--resources.keep_activations", "until_done")
    storage = done.storage
    for sae in done.resolved.saes:
        record = {"lineage": {"harvest": sae.harvest_id}}
        storage.write(layout.record(sae.id), json.dumps(record).encode())
        storage.write(layout.evaluation(sae.id, done.resolved.evaluation_id), b"{}")
    harvests = [part.harvest_id for part in done.resolved.parts()]
    assert len(set(harvests)) == 2
    blocks = {layout.block_file(harvest, "model.layers.0.mlp", "block") for harvest in harvests}
    for key in blocks:
        storage.write(key, b"rows")
    assert {one.key for one in spent_activations(survey(storage), grace=0)} == blocks
    running = started(config, store, "--name", "running", "--sae.l1_coefficient", "0.7")
    assert {part.harvest_id for part in running.resolved.parts()} == set(harvests)
    assert spent_activations(survey(storage), asked=True, grace=0) == []


def test_a_sweep_that_goes_on_takes_on_the_settings_of_its_new_run(tmp_path: Path) -> None:
    config, store = write_run(tmp_path), tmp_path / "store"
    first = started(config, store, "--note", "the first of all")
    before = sweep_json(first)
    old = {name: value for name, value in before.items() if name != "harvests"}
    first.storage.write(layout.sweep_record(first.id), json.dumps(old).encode())  # as an older version wrote it
    again = started(config, store, "--resources.keep_activations", "until_done")
    assert again.id == first.id
    after = sweep_json(again)
    assert before["config"]["resources"].pop("keep_activations") == "always"
    assert after["config"]["resources"].pop("keep_activations") == "until_done"
    assert after == before


def test_what_another_run_has_measured_is_no_failure_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one removes the activations in the middle of this one's evaluation: before it has measured all, and
    when it has."""
    run = started(write_run(tmp_path), tmp_path / "store")
    for sae in run.resolved.saes:
        run.storage.write(layout.training(sae.id), b"{}")
    last = run.resolved.saes[-1]

    def others(count: int) -> None:
        for sae in run.resolved.saes[:count]:
            run.storage.write(layout.evaluation(sae.id, run.resolved.evaluation_id), b"{}")
        raise CorruptError("The block is gone.")

    monkeypatch.setattr(sweeprun, "model_slots", lambda *_: None)
    monkeypatch.setattr(sweeprun, "measure", lambda *_: others(len(run.resolved.saes) - 1))
    with pytest.raises(CorruptError, match="The block is gone"):
        run._evaluate(None)  # type: ignore[arg-type]
    assert run._unmeasured() == [last]
    monkeypatch.setattr(sweeprun, "measure", lambda *_: others(len(run.resolved.saes)))
    run._evaluate(None)  # type: ignore[arg-type]
    assert run._unmeasured() == []


def test_force_leaves_what_people_said(tmp_path: Path) -> None:
    config, store = write_run(tmp_path), tmp_path / "store"
    first = started(config, store, "--tag", "kept", "--note", "read with care")
    sae = first.resolved.saes[0].id
    said = layout.sae_file(sae, "annotations.json")
    for key in (said, layout.training(sae), layout.sweep_file(first.id, "failures.json")):
        first.storage.write(key, b"{}")
    again = started(config, store, "--force")
    assert again.storage.list(layout.sae_folder(sae)) == [said]
    of_sweep = again.storage.list(layout.sweep_folder(again.id))
    assert of_sweep == [layout.sweep_file(again.id, name) for name in ("annotations.json", "sweep.json")]
    assert read_annotations(again.storage, "sweep", again.id) == ("read with care", ["kept"])


class Cut(Exception): ...


def test_a_force_that_is_cut_short_is_ended_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it was cut: an SAE is then as it was, but for its record, or nothing of it is left."""
    config, store = write_run(tmp_path), tmp_path / "store"
    first = started(config, store)
    sae, storage = first.resolved.saes[0].id, first.storage
    evaluation = layout.evaluation(sae, first.resolved.evaluation_id)
    names = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "features/f.1/manifest.json")
    rest = {layout.training(sae), evaluation, *(layout.sae_file(sae, name) for name in names)}
    real, left = LocalStorage.delete, 0

    def delete(self: LocalStorage, key: str) -> None:
        nonlocal left
        if left == 0:
            raise Cut
        left -= 1
        real(self, key)

    found: list[set[str]] = []
    for cut in range(len(rest) + 1):
        for key in (layout.record(sae), *rest):
            storage.write(key, b"{}")
        left = cut
        monkeypatch.setattr(LocalStorage, "delete", delete)
        with pytest.raises(Cut):
            started(config, store, "--force")
        monkeypatch.setattr(LocalStorage, "delete", real)
        started(config, store)
        found.append(set(storage.list(layout.sae_folder(sae))))
    assert found == [{layout.record(sae), *rest}, rest, *[set()] * (len(rest) - 1)]


class Clock:
    """Time that passes as told; the machine's own `time` for the rest."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def test_the_minutes_of_a_sweep_are_those_of_all_its_runs(tmp_path: Path, clock: Clock) -> None:
    storage = open_store(str(tmp_path / "store"))

    def run(minutes: float, *, first: bool = False, died: bool = False) -> float | None:
        watch = Stopwatch(storage, "demo.1")
        watch.start(first=first)
        clock.now += 60 * minutes
        if not died:
            watch.stop()
        return watch.minutes()

    assert run(9, first=True) == 9
    assert run(2) == 11
    nothing = Stopwatch(storage, "demo.1")  # finds everything made
    clock.now += 60
    nothing.stop()
    assert nothing.minutes() == 11
    assert run(5, died=True) is None
    assert run(1) is None


def test_the_minutes_are_not_known_where_other_sweeps_made_the_saes(tmp_path: Path, clock: Clock) -> None:
    watch = Stopwatch(open_store(str(tmp_path / "store")), "demo.1")
    assert watch.minutes() is None
    watch.start(first=False)
    clock.now += 60
    watch.stop()
    assert watch.minutes() is None


def test_a_report_has_the_note_and_tags_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given on the second run, and by `runs annotate` between the two."""
    config, store = write_run(tmp_path), tmp_path / "store"
    first = started(config, store, "--tag", "old", "--note", "a first look")
    with Tracker.for_store(first.storage) as tracker:
        tracker.annotate(first.id, remove_tags=["old"])
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(SweepRun, "_report", lambda _self, sweep, _results: told.append(sweep))
    with prepare(parse_job("sweep", [str(config), "--store", str(store), "--tag", "new", "--note", "again"])) as ready:
        run = SweepRun(ready, Silent(), None)  # type: ignore[arg-type]
        run._start()
        assert run._finish() == Results(rows=[], curves=[], densities=[], records=[])
    assert (sweep_json(run)["note"], sweep_json(run)["tags"]) == ("a first look", ["old"])
    assert [(sweep["note"], sweep["tags"], sweep["id"]) for sweep in told] == [("again", ["new"], run.id)]


def test_a_note_that_cannot_be_read_stops_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, store = write_run(tmp_path), tmp_path / "store"
    first = started(config, store, "--note", "a first look")
    first.storage.write(layout.sweep_file(first.id, "annotations.json"), b"no JSON")
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(SweepRun, "_report", lambda _self, sweep, _results: told.append(sweep))
    run = started(config, store, "--tag", "new")
    assert run._finish() == Results(rows=[], curves=[], densities=[], records=[])
    assert [(sweep["note"], sweep["tags"]) for sweep in told] == [("a first look", [])]
    assert first.storage.read(layout.sweep_file(first.id, "annotations.json")) == b"no JSON"


def test_a_sweep_is_done_though_its_activations_can_not_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(write_run(tmp_path), tmp_path / "store", "--resources.keep_activations", "until_done")
    said: list[str] = []

    def away(*_: Any) -> None:
        raise StoreFailedError("the bucket is away")

    monkeypatch.setattr(SweepRun, "_report", lambda *_: None)
    monkeypatch.setattr(SweepRun, "missing", lambda *_: set())
    monkeypatch.setattr(sweeprun.upkeep, "survey", away)
    monkeypatch.setattr(Silent, "say", lambda _self, text: said.append(text))
    run._finish()
    assert said == ["activations were not removed: the bucket is away"]


def test_how_a_sweep_ended_is_told_though_the_store_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, store = write_run(tmp_path), str(tmp_path / "store")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def away(*_: Any) -> None:
        raise StoreFailedError("the bucket is away")

    monkeypatch.setattr(sweeprun, "ensure_corpus", stop)
    monkeypatch.setattr(Stopwatch, "stop", away)
    with prepare(parse_job("sweep", [str(config), "--store", store])) as ready:
        run = SweepRun(ready, Silent(), None)  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            run.run()
        assert [one["status"] for one in ready.tracker.list_runs()] == ["interrupted"]
