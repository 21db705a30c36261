"""The database rebuilt from the store equals the one that the run itself wrote."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from midiscover.errors import StoreFailedError
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Storage, open_store
from midiscover.tracking.annotations import annotations_key
from midiscover.tracking.reindex import reindex
from midiscover.tracking.sweepfiles import retired_reason
from midiscover.tracking.tracker import Tracker
from tests.unit.tracking import samples


@pytest.fixture
def told(tracker: Tracker, storage: Storage) -> Tracker:
    """A store with two sweeps, and the tracker as their drivers left it.

    One sweep is done; the other shares two SAEs with it, has one that failed, one that is trained but not measured, one
    that was retired and one that was never begun. A person annotated both, and one of the SAEs.
    """
    whole, part = samples.sweep(), samples.sweep("part", (8.0, 20.0, 50.0), evaluation_id="e.other", note=None, tags=[])
    for sweep in (whole, part):
        samples.put(storage, layout.sweep_record(sweep["id"]), sweep)
        tracker.start_sweep(sweep)
    for number, planned in enumerate(whole["saes"]):
        record = samples.record(planned, l0=10.0 + number, fvu=0.5 - number / 20)
        samples.put_sae(storage, record)
        tracker.record_steps(record["id"], samples.history())
        tracker.record_sae(record)
    samples.put_features(storage, whole["sae_ids"][0])
    tracker.record_features(whole["sae_ids"][0], "f.3333333333", samples.features())
    report = b"<html>report</html>"
    key = layout.sweep_file(whole["id"], "report.html")
    storage.write(key, report)
    digest = hashlib.sha256(report).hexdigest()
    tracker.add_artifact("sweep", whole["id"], "report.html", key, sha256=digest, size=len(report))
    tracker.finish_sweep(whole["id"], "done")

    shared, trained, failed = part["saes"][0], part["saes"][1], part["saes"][2]
    again = samples.metrics(33.0, 0.33)
    samples.put(storage, layout.evaluation(shared["sae_id"], "e.other"), {"v": 1, "metrics": again})
    tracker.record_metrics(shared["sae_id"], "e.other", again)
    samples.put(
        storage, layout.training(trained["sae_id"]), {"v": 1, "id": trained["sae_id"], "history": samples.history()}
    )
    tracker.record_steps(trained["sae_id"], samples.history())
    tracker.sae_status(trained["sae_id"], "trained")
    samples.put(storage, layout.sweep_file(part["id"], "failures.json"), {failed["sae_id"]: "out of memory"})
    tracker.sae_status(failed["sae_id"], "failed", "out of memory")
    dropped = part["saes"][4]
    word = {"v": 1, "id": dropped["sae_id"], "step": 40, "by": shared["sae_id"]}
    samples.put(storage, layout.retired(part["id"], dropped["sae_id"]), word)
    tracker.sae_status(dropped["sae_id"], "retired", retired_reason(word))
    tracker.finish_sweep(part["id"], "failed")

    tracker.annotate(whole["id"], "the one for the paper", add_tags=["paper"], remove_tags=["small"])
    tracker.annotate(whole["sae_ids"][0], "monosemantic", add_tags=["nice"])
    tracker.annotate(failed["sae_id"], "try with less")
    return tracker


def test_rebuilt_equals_the_original(told: Tracker, storage: Storage, address: str, tmp_path: Path) -> None:
    before = samples.dump(address)
    assert before.pop("api_keys") == [], "keys are in no store: see test_keys_outlive_a_reindex"
    assert all(before.values()), "the sample fills every other table"
    fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
    with Tracker.open(fresh) as rebuilt:
        counts = reindex(storage, rebuilt)
        assert counts == (2, 6, 7, 1, 1, 3, {})
        assert samples.dump(fresh) == before | {"api_keys": []}
        assert rebuilt.compare("demo") == told.compare("demo")
        assert rebuilt.steps(samples.sweep()["sae_ids"][0]) == told.steps(samples.sweep()["sae_ids"][0])


def test_reindexing_a_current_database_changes_nothing(told: Tracker, storage: Storage, address: str) -> None:
    before = samples.dump(address, leave_out=set())
    assert reindex(storage, told) == reindex(storage, told)
    assert samples.dump(address, leave_out=set()) == before


def test_a_reindex_that_breaks_off_takes_nothing_back(
    told: Tracker, storage: Storage, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = samples.dump(address, leave_out=set())

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(told, "record_steps", broken)
    with pytest.raises(KeyboardInterrupt):
        reindex(storage, told)
    assert samples.dump(address, leave_out=set()) == before


def test_a_store_takes_back_nothing_of_another_in_the_same_database(
    told: Tracker, storage: Storage, address: str, tmp_path: Path
) -> None:
    """The same sweeps, begun in a second store: none of their SAEs is done there, and nobody said anything there."""
    other = open_store(str(tmp_path / "other"))
    for key in storage.list(layout.SWEEPS):
        if key.endswith("sweep.json"):
            other.write(key, storage.read(key))
    before = samples.dump(address, leave_out=set())
    with Tracker.open(address, other) as second:
        assert reindex(other, second) == (2, 0, 0, 0, 0, 0, {})
    assert samples.dump(address, leave_out=set()) == before


def test_what_the_database_refuses_is_named_and_the_rest_read(tracker: Tracker, storage: Storage, address: str) -> None:
    good = samples.sweep()
    large = samples.plan(samples.HOOKS[0], 99.0) | {"seed": 2**63}
    sweeps = (good, samples.sweep("large", sae_ids=[large["sae_id"]], saes=[large]))
    for sweep in sweeps:
        samples.put(storage, layout.sweep_record(sweep["id"]), sweep)
    samples.put_sae(storage, samples.record(good["saes"][0]))
    failures = {good["sae_ids"][1]: "no /data/caf\udce9.txt"}
    samples.put(storage, layout.sweep_file(good["id"], "failures.json"), failures)
    said = annotations_key("sae", good["sae_ids"][0])
    samples.put(storage, said, {"v": 1, "note": None, "tags": [7]})
    found = reindex(storage, tracker)
    assert found.unreadable.keys() == {layout.sweep_record(sweeps[1]["id"]), said}
    assert (found.sweeps, found.saes) == (1, 1)
    [run] = tracker.list_runs()
    assert (run["id"], run["status"], run["done"], run["failed"]) == (good["id"], "failed", 1, 1)
    assert tracker.show(good["sae_ids"][1])["reason"] == "no /data/caf\\udce9.txt"


def test_keys_outlive_a_reindex(told: Tracker, storage: Storage, address: str) -> None:
    told.create_key("ada", ["read"])
    before = samples.dump(address)["api_keys"]
    assert len(before) == 1
    reindex(storage, told)
    assert samples.dump(address)["api_keys"] == before


def test_what_the_database_missed_is_filled_in(tracker: Tracker, storage: Storage) -> None:
    """A driver that was killed: its last words in the database are older than what it committed to the store."""
    sweep = samples.sweep()
    samples.put(storage, layout.sweep_record(sweep["id"]), sweep)
    tracker.start_sweep(sweep)
    tracker.sae_status(sweep["sae_ids"][0], "training")
    tracker.sae_status(sweep["sae_ids"][1], "training")
    samples.put_sae(storage, samples.record(sweep["saes"][0]))
    reindex(storage, tracker)
    shown = tracker.show(sweep["id"])
    assert shown["status"] == "interrupted"
    assert [sae["status"] for sae in shown["saes"]] == ["done", *["planned"] * 5]
    assert len(tracker.compare("demo")) == 1


def test_a_sweep_whose_missing_saes_were_all_retired_is_done(tracker: Tracker, storage: Storage) -> None:
    sweep = samples.sweep()
    samples.put(storage, layout.sweep_record(sweep["id"]), sweep)
    for planned in sweep["saes"][:-1]:
        samples.put_sae(storage, samples.record(planned))
    last = sweep["sae_ids"][-1]
    samples.put(storage, layout.retired(sweep["id"], last), {"v": 1, "id": last, "step": 7, "by": "another"})
    reindex(storage, tracker)
    shown = tracker.show(sweep["id"])
    assert (shown["status"], shown["saes"][-1]["status"]) == ("done", "retired")
    assert shown["saes"][-1]["reason"] == "dropped at step 7: another had a lower L0 and a lower FVU"


def test_a_store_of_the_first_release_fills_the_new_columns(tracker: Tracker, storage: Storage) -> None:
    """Plans without output hook, label, control and target; records whose settings have neither control nor target."""
    new = ("output_hook", "control", "sparsity_label", "target_l0")
    sweep = samples.sweep()
    old = [{name: value for name, value in row.items() if name not in new} for row in sweep["saes"]]
    old[1] |= {"kind": "topk", "l1": None, "k": 32}
    samples.put(storage, layout.sweep_record(sweep["id"]), sweep | {"saes": old})
    samples.put_sae(storage, samples.record(sweep["saes"][0]))
    reindex(storage, tracker)
    found = [tracker.show(row["sae_id"]) for row in old[:3]]
    assert [(sae["status"], sae["sparsity"], sae["control"], sae["target_l0"]) for sae in found] == [
        ("done", "l1 1", "none", None),
        ("planned", "k 32", "none", None),
        ("planned", "l1 8", "none", None),
    ]
    assert [sae["output_hook"] for sae in found] == [row["hook"] for row in old[:3]]
    assert tracker.compare("demo")[0]["sparsity_label"] == "l1 1"


def test_an_sae_without_a_sweep_is_found(tracker: Tracker, storage: Storage) -> None:
    planned = samples.plan(samples.HOOKS[0], 1.0)
    samples.put_sae(storage, samples.record(planned))
    assert reindex(storage, tracker).saes == 1
    assert tracker.steps(planned["sae_id"])["step"] == samples.history()["step"]


def test_damaged_files_are_named_and_passed_over(told: Tracker, storage: Storage, tmp_path: Path) -> None:
    sweep = samples.sweep()
    bad = {
        layout.record(sweep["sae_ids"][0]): b'{"v": 1, "id": ',
        layout.record(sweep["sae_ids"][1]): b'{"v": 2}',
        layout.record(sweep["sae_ids"][2]): b"[]",
        layout.record(sweep["sae_ids"][3]): b'{"v": 1, "id": "x"}',
        layout.training(sweep["sae_ids"][4]): b'{"v": 1, "history": {"step": [1], "loss": []}}',
        annotations_key("sweep", sweep["id"]): b"\xff",
        layout.sweep_record("half"): b'{"v": 1, "id": "half"}',
    }
    for key, data in bad.items():
        storage.write(key, data)
    with Tracker.open(f"sqlite:///{tmp_path / 'fresh.db'}") as rebuilt:
        counts = reindex(storage, rebuilt)
        assert counts.unreadable.keys() == bad.keys()
        assert "version 2" in counts.unreadable[layout.record(sweep["sae_ids"][1])]
        assert (counts.sweeps, counts.saes) == (2, 2)
        assert len(rebuilt.compare("demo")) == 2
        assert rebuilt.show(sweep["id"])["tags"] == ["first", "small"]


def test_a_report_that_is_removed_in_between_is_passed_over(
    told: Tracker, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a sweep that is made anew meanwhile."""
    key, gone = layout.sweep_file(samples.sweep()["id"], "report.html"), []
    storage.write(key, b"<p>")
    real = type(storage).read

    def read(self: Storage, wanted: str, *part: int) -> bytes:
        if wanted == key:
            gone.append(wanted)
            self.delete(wanted)
        return real(self, wanted, *part)

    monkeypatch.setattr(type(storage), "read", read)
    counts = reindex(storage, told)
    assert gone == [key]
    assert (counts.sweeps, counts.unreadable) == (2, {})


@pytest.mark.parametrize("how", ["bits turned over", "cut short", "no parquet by its manifest either"])
def test_damaged_features_are_named_and_no_number_of_them_taken(
    told: Tracker, storage: Storage, tmp_path: Path, how: str
) -> None:
    sae, features_id = samples.sweep()["sae_ids"][0], "f.3333333333"
    key, manifest = (layout.features_file(sae, features_id, name) for name in ("features.parquet", "manifest.json"))
    good = storage.read(key)
    if how == "no parquet by its manifest either":
        data = b"PAR1" + good[4:-40] + b"\xff" * 32 + good[-8:]
        files = {"features.parquet": {"sha256": hashlib.sha256(data).hexdigest()}}
        samples.put(storage, manifest, {"v": 1, "sae": sae, "features_id": features_id, "files": files})
        with pytest.raises((OSError, pa.ArrowException)):
            pq.read_table(io.BytesIO(data))
    elif how == "cut short":
        data = good[: len(good) // 2]
    else:
        place = good.index(np.float64(samples.features()[0]["mean"]).tobytes())
        data = good[:place] + np.float64(9.0).tobytes() + good[place + 8 :]
        assert pq.read_table(io.BytesIO(data)).to_pylist()[0]["mean"] == 9.0, "parquet itself sees nothing"
    storage.write(key, data)
    with Tracker.open(f"sqlite:///{tmp_path / 'fresh.db'}") as rebuilt:
        counts = reindex(storage, rebuilt)
        assert counts == (2, 6, 7, 1, 0, 3, counts.unreadable)
        [(named, reason)] = counts.unreadable.items()
        assert named == manifest
        assert key in reason
    assert samples.dump(f"sqlite:///{tmp_path / 'fresh.db'}")["features"] == []


def test_a_store_that_fails_ends_the_reindex(told: Tracker, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not give is not damaged."""

    def fail(self: LocalStorage, key: str, *_: Any) -> bytes:
        raise StoreFailedError(f"Can't read {key}: Input/output error.")

    monkeypatch.setattr(LocalStorage, "read", fail)
    with pytest.raises(StoreFailedError):
        reindex(storage, told)
