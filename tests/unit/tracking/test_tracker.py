"""What a run writes comes out again: sweeps, SAEs, curves, comparisons, notes and tags."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from midiscover.errors import CorruptError, NotFoundError, TrackingError, TrackingRefusedError
from midiscover.results import FOREIGN_METRICS, ROW_METRICS
from midiscover.store import layout
from midiscover.store.storage import Storage
from midiscover.tracking.rows import PLANNED
from midiscover.tracking.sweepfiles import stability_document
from midiscover.tracking.tracker import Tracker
from tests.unit.tracking import samples


def test_a_run_from_start_to_end(tracker: Tracker, demo: dict) -> None:
    first, second, *rest = demo["saes"]
    assert {sae["status"] for sae in tracker.show(demo["id"])["saes"]} == {"planned"}
    tracker.sae_status(first["sae_id"], "training")
    tracker.record_steps(first["sae_id"], samples.history())
    tracker.sae_status(first["sae_id"], "trained")
    tracker.record_sae(samples.record(first, l0=20.0, fvu=0.3))
    tracker.sae_status(second["sae_id"], "failed", "loss is not finite at step 7")
    for planned in rest:
        tracker.record_sae(samples.record(planned))
    tracker.finish_sweep(demo["id"], "failed")

    shown = tracker.show(demo["id"])
    assert shown["type"] == "sweep"
    assert [sae["id"] for sae in shown["saes"]] == demo["sae_ids"]
    assert (shown["status"], shown["owner"], shown["note"]) == ("failed", "ada", "a first look")
    assert (shown["tags"], shown["config"], shown["lineage"]) == (["first", "small"], demo["config"], demo["lineage"])
    assert (shown["corpus_id"], shown["harvest_id"]) == (demo["corpus"], demo["harvest"])
    assert shown["saes"][1]["reason"] == "loss is not finite at step 7"
    [listed] = tracker.list_runs()
    assert [listed[name] for name in ("saes", "done", "failed", "retired", "status")] == [6, 5, 1, 0, "failed"]
    assert listed["started_at"] <= listed["ended_at"]
    json.dumps([shown, listed, tracker.compare(demo["id"])])


def test_an_sae_shows_its_record(tracker: Tracker, demo: dict) -> None:
    planned = demo["saes"][2]
    tracker.record_sae(samples.record(planned, l0=7.5))
    shown = tracker.show(planned["sae_id"])
    assert (shown["type"], shown["status"], shown["sweeps"]) == ("sae", "done", [demo["id"]])
    assert (shown["l1"], shown["k"], shown["seed"], shown["seconds"]) == (planned["l1"], None, 0, 12.5)
    assert (shown["model_name"], shown["model_revision"], shown["harvest_id"]) == ("tiny", None, "h.2222222222")
    assert (shown["code_version"], shown["code_commit"]) == ("0.1.0", "abc123")
    assert shown["created_at"] == "2026-11-23T18:00:00+00:00"  # UTC, given as 19:00+01:00
    assert shown["metrics"]["l0"] == 7.5
    assert "ce_recovered" not in shown["metrics"]
    assert shown["metrics"]["kl_recovered"] is None
    assert shown["record"]["metrics"]["density"]["counts"] == [60, 3]
    assert shown["artifacts"][0]["uri"] == layout.sae_file(planned["sae_id"], "cfg.json")


def test_steps_come_back_as_they_went_in(tracker: Tracker, demo: dict) -> None:
    name = demo["sae_ids"][0]
    given = samples.history()
    tracker.record_steps(name, given)
    assert tracker.steps(name) == {**given, "loss": [*given["loss"][:-1], None]}
    # A run that resumed at step 30 tells its curve from there on, and this time ends earlier.
    tracker.record_steps(name, {"step": [30, 40], "loss": [7.0, 8.0]})
    found = tracker.steps(name)
    assert found["step"] == [10, 20, 30, 40]
    assert found["loss"] == [1 / 10, 1 / 20, 7.0, 8.0]
    assert found["l0"] == [10 / 3, 20 / 3, None, None]
    tracker.record_steps(name, {"step": [], "loss": []})
    assert tracker.steps(name) == found


def test_a_history_with_ragged_columns_is_a_mistake(tracker: Tracker, demo: dict) -> None:
    with pytest.raises(ValueError, match="equal length"):
        tracker.record_steps(demo["sae_ids"][0], {"step": [1, 2], "loss": [0.5]})


def test_a_sweep_that_starts_again_forgets_nothing(tracker: Tracker, demo: dict) -> None:
    _, trained, failed = demo["sae_ids"][:3]
    tracker.record_sae(samples.record(demo["saes"][0]))
    tracker.sae_status(trained, "trained")
    tracker.sae_status(failed, "failed", "out of memory")
    tracker.annotate(demo["id"], "keep this", remove_tags=["small"])
    tracker.finish_sweep(demo["id"], "interrupted")
    tracker.start_sweep(demo)
    shown = tracker.show(demo["id"])
    assert [sae["status"] for sae in shown["saes"]][:4] == ["done", "trained", "planned", "planned"]
    assert shown["saes"][2]["reason"] is None
    assert (shown["status"], shown["ended_at"], shown["note"], shown["tags"]) == (
        "running",
        None,
        "keep this",
        ["first"],
    )


def test_an_sae_that_is_made_anew_is_not_compared_meanwhile(tracker: Tracker, demo: dict) -> None:
    name = demo["sae_ids"][0]
    tracker.record_sae(samples.record(demo["saes"][0], l0=20.0))
    tracker.sae_status(name, "training")
    assert tracker.compare("demo") == []
    tracker.record_sae(samples.record(demo["saes"][0], l0=21.0))
    assert [row["l0"] for row in tracker.compare("demo")] == [21.0]


def test_writes_about_what_was_never_started_say_so(tracker: Tracker) -> None:
    for write in (
        lambda: tracker.sae_status("nobody", "training"),
        lambda: tracker.record_steps("nobody", samples.history()),
        lambda: tracker.record_metrics("nobody", "e.1", {"l0": 1.0}),
        lambda: tracker.finish_sweep("nobody", "done"),
    ):
        with pytest.raises(TrackingError, match=r"nobody.*reindex"):
            write()


def test_a_plan_with_an_unknown_key_is_a_mistake(tracker: Tracker) -> None:
    sweep = samples.sweep()
    with pytest.raises(ValueError, match="width"):
        tracker.start_sweep(sweep, [sweep["saes"][0] | {"width": 3}])
    with pytest.raises(ValueError, match="stranger"):
        tracker.start_sweep(sweep, [{"sae_id": "stranger"}])
    assert tracker.list_runs() == []


def test_compare_marks_the_frontier_of_each_hook(tracker: Tracker, demo: dict) -> None:
    points = [(150.0, 0.1), (60.0, 0.2), (70.0, 0.3), (5.0, 0.9), (5.0, 0.95), (4.0, 0.9)]
    for planned, (l0, fvu) in zip(demo["saes"], points, strict=True):
        tracker.record_sae(samples.record(planned, l0=l0, fvu=fvu))
    rows = tracker.compare("demo")
    assert [row["sae_id"] for row in rows] == demo["sae_ids"]
    assert [(row["l0"], row["fvu"]) for row in rows] == points
    assert [row["frontier"] for row in rows] == [True, True, False, False, False, True]
    assert {*PLANNED, *ROW_METRICS, *FOREIGN_METRICS, "sae_id", "seconds"} - {"settings"} <= rows[0].keys()
    assert {(row["control"], row["output_hook"] == row["hook"], row["fvu_foreign"]) for row in rows} == {
        ("none", True, None)
    }
    assert [row["sparsity_label"] for row in rows[:3]] == ["l1 1", "l1 3", "l1 8"]
    assert rows[0]["ce_recovered"] is None


def test_compare_reads_the_evaluation_of_its_sweep(tracker: Tracker, demo: dict) -> None:
    """The same SAEs measured in two ways are two sweeps, and neither shows the other's numbers."""
    longer = samples.sweep("longer", evaluation_id="e.longer")
    tracker.start_sweep(longer)
    planned = demo["saes"][0]
    tracker.record_sae(samples.record(planned, l0=20.0))
    assert tracker.compare(longer["id"]) == []
    tracker.record_metrics(planned["sae_id"], "e.longer", samples.metrics(21.0, 0.31))
    assert [row["l0"] for row in tracker.compare(demo["id"])] == [20.0]
    assert [row["l0"] for row in tracker.compare(longer["id"])] == [21.0]
    assert tracker.show(planned["sae_id"])["evaluations"].keys() == {samples.EVALUATION, "e.longer"}


def test_a_topk_sae_is_named_by_its_k(tracker: Tracker) -> None:
    planned = samples.plan(samples.HOOKS[0], 1.0) | {"kind": "topk", "l1": None, "k": 32, "sparsity_label": "k 32"}
    tracker.start_sweep(samples.sweep(sae_ids=[planned["sae_id"]], saes=[planned]))
    tracker.record_sae(samples.record(planned, kind="topk", l1=None, sae={"kind": "topk", "k": 32}))
    [row] = tracker.compare("demo")
    assert (row["sparsity_label"], row["k"], row["l1"]) == ("k 32", 32, None)


def test_a_steered_sae_is_named_by_its_target_and_not_by_where_its_coefficient_ended(tracker: Tracker) -> None:
    settings = {"sae": {"kind": "standard", "l1_coefficient": 5.0, "target_l0": 60.0}, "train": {}}
    planned = samples.plan(samples.HOOKS[0], 5.0) | {"l1": None, "target_l0": 60.0, "sparsity_label": "L0 60"}
    planned["settings"] = settings
    tracker.start_sweep(samples.sweep(sae_ids=[planned["sae_id"]], saes=[planned]))
    before = tracker.show(planned["sae_id"])
    tracker.record_sae(samples.record(planned, l1={"coefficient": 3.21, "raw_scale": 0.5, "seed": 77.0}))
    [row] = tracker.compare("demo")
    assert (row["sparsity_label"], row["target_l0"], row["l1"]) == ("L0 60", 60.0, None)
    shown = tracker.show(planned["sae_id"])
    assert all(before[name] == shown[name] for name in ("sparsity", "target_l0", "l1", "k", "control", "output_hook"))


def test_saes_that_only_a_learning_rate_tells_apart_are_named_by_it(tracker: Tracker) -> None:
    plans = []
    for lr in (1e-3, 3e-3):
        planned = samples.plan(samples.HOOKS[0], 1.0)
        planned["settings"] = {"sae": planned["settings"]["sae"], "train": {"lr": lr}}
        plans.append(planned | {"sae_id": f"{planned['sae_id']}.{lr}"})
    tracker.start_sweep(samples.sweep(sae_ids=[planned["sae_id"] for planned in plans], saes=plans))
    for planned in plans:
        tracker.record_sae(samples.record(planned))
    assert [row["variant"] for row in tracker.compare("demo")] == ["lr 0.001", "lr 0.003"]
    assert "settings" not in tracker.compare("demo")[0]


def test_controls_are_compared_but_on_no_frontier(tracker: Tracker) -> None:
    """The same numbers under the name of a control: neither marked, nor in the way of others."""
    trained, control = samples.plan(samples.HOOKS[0], 1.0), samples.plan(samples.HOOKS[0], 3.0)
    control |= {"control": "untrained", "settings": {"sae": control["settings"]["sae"] | {"control": "untrained"}}}
    control["settings"]["train"] = trained["settings"]["train"]
    tracker.start_sweep(samples.sweep(sae_ids=[trained["sae_id"], control["sae_id"]], saes=[trained, control]))
    tracker.record_sae(samples.record(trained, l0=50.0, fvu=0.5))
    tracker.record_sae(samples.record(control, l0=5.0, fvu=0.1))
    found = [(row["control"], row["frontier"], row["best_of_kind"]) for row in tracker.compare("demo")]
    assert found == [("none", True, True), ("untrained", False, False)]


def test_foreign_measures_come_out_as_they_went_in(tracker: Tracker, demo: dict) -> None:
    metrics = samples.metrics(20.0, 0.3) | {"fvu_foreign": 0.71, "l0_foreign": 24.0}
    tracker.record_sae(samples.record(demo["saes"][0], metrics=metrics))
    [row] = tracker.compare("demo")
    assert (row["fvu_foreign"], row["l0_foreign"]) == (0.71, 24.0)


def test_a_retired_sae_is_counted_with_its_reason(tracker: Tracker, demo: dict) -> None:
    name, reason = demo["sae_ids"][0], "dropped at step 7"
    tracker.sae_status(name, "retired", reason)
    tracker.start_sweep(demo)  # goes on: what was dropped stays dropped
    assert (tracker.show(name)["status"], tracker.show(name)["reason"]) == ("retired", reason)
    [listed] = tracker.list_runs()
    assert (listed["saes"], listed["retired"], listed["failed"]) == (6, 1, 0)
    assert tracker.compare("demo") == []


def test_stability_is_what_lies_in_the_store(tracker: Tracker, storage: Storage, demo: dict, address: str) -> None:
    assert tracker.stability("demo") == []
    pairs = [{"axis": "seed", "a": "x", "b": "y", "matched": 0.5}]
    key = layout.sweep_file(demo["id"], "stability.json")
    samples.put(storage, key, stability_document(pairs))
    assert tracker.stability("demo") == pairs
    with Tracker.open(address) as without_store:
        assert without_store.stability("demo") == []
    for damaged in (b"{", b'{"v": 2}', b"[]"):
        storage.write(key, damaged)
        with pytest.raises(CorruptError, match=r"stability\.json"):
            tracker.stability("demo")


def test_runs_are_listed_newest_first(tracker: Tracker) -> None:
    for name, hour in (("noon", "12:00:00+00:00"), ("late", "23:30:00+00:00"), ("early", "13:00:00+14:00")):
        tracker.start_sweep(samples.sweep(name, created=f"2026-11-23T{hour}"))
    assert [run["name"] for run in tracker.list_runs()] == ["late", "noon", "early"]
    started = datetime.fromisoformat(tracker.list_runs()[0]["started_at"])
    assert abs((datetime.now(UTC) - started).total_seconds()) < 60


def test_ids_may_be_short_as_long_as_they_are_unique(tracker: Tracker, demo: dict) -> None:
    assert tracker.show("de")["id"] == demo["id"]
    tracker.start_sweep(samples.sweep("demo-2", (1.0,), id="demo.0000000006x"))
    assert tracker.show(demo["id"])["id"] == demo["id"]  # a whole id wins over its being the start of another
    with pytest.raises(NotFoundError, match=r"'de' is the start of demo\.0000000006, demo\.0000000006x"):
        tracker.show("de")
    with pytest.raises(NotFoundError, match="and 1 more"):
        tracker.show("l")
    with pytest.raises(NotFoundError, match=r"No sweep 'dmeo\.0000000006'; the nearest: demo\.0000000006"):
        tracker.compare("dmeo.0000000006")
    for stranger in ("DEMO", "%", "d_mo", "l1' OR '1'='1"):
        with pytest.raises(NotFoundError, match="No sweep or SAE"):
            tracker.show(stranger)


def test_an_empty_tracker_names_the_way_out(tracker: Tracker) -> None:
    with pytest.raises(NotFoundError, match=r"empty.*reindex"):
        tracker.show("demo")
    assert tracker.list_runs() == []


def test_what_programs_wrote_is_taken_whatever_it_holds(tracker: Tracker, demo: dict) -> None:
    """A reason may name a file whose name is no UTF-8; a setting may hold anything."""
    odd, escaped = "no /data/caf\udce9.txt \0", "no /data/caf\\udce9.txt \\x00"
    tracker.sae_status(demo["sae_ids"][0], "failed", odd)
    assert tracker.show(demo["sae_ids"][0])["reason"] == escaped
    sweep = samples.sweep("odd", config={odd: [odd]}, owner=odd, note=odd, tags=[odd])
    tracker.start_sweep(sweep)
    shown = tracker.show(sweep["id"])
    assert (shown["config"], shown["owner"], shown["note"], shown["tags"]) == (
        {escaped: [escaped]},
        escaped,
        escaped,
        [escaped],
    )


@pytest.mark.parametrize("seed", [2**63, 10**400])
def test_what_the_database_cannot_hold_is_refused_and_not_an_outage(tracker: Tracker, demo: dict, seed: int) -> None:
    too_large = samples.plan(samples.HOOKS[0], 1.0) | {"seed": seed}
    with pytest.raises(TrackingRefusedError):
        tracker.start_sweep(samples.sweep("large", sae_ids=[too_large["sae_id"]], saes=[too_large]))
    with pytest.raises(TrackingRefusedError):
        tracker.sae_status("nobody", "training")
    assert [run["name"] for run in tracker.list_runs()] == ["demo"]


def test_artifacts_of_a_sweep(tracker: Tracker, demo: dict) -> None:
    for digest in ("0" * 64, "1" * 64):
        tracker.add_artifact("sweep", demo["id"], "report.html", "sweeps/x/report.html", sha256=digest, size=2**40)
    assert tracker.show("demo")["artifacts"] == [
        {"name": "report.html", "uri": "sweeps/x/report.html", "sha256": "1" * 64, "bytes": 2**40}
    ]


def test_many_writers_at_once(tracker: Tracker, address: str, demo: dict) -> None:
    """Two trackers, eight threads, all of them writing the same rows: nothing is lost, doubled or refused."""
    with Tracker.open(address) as other, ThreadPoolExecutor(8) as pool:
        work = [(each, planned) for planned in demo["saes"] for each in (tracker, other, tracker)]

        def write(job: tuple[Tracker, dict]) -> None:
            job[0].record_steps(job[1]["sae_id"], samples.history(20))
            job[0].record_sae(samples.record(job[1]))
            job[0].start_sweep(demo)

        list(pool.map(write, work))
    found = samples.dump(address)
    assert {row["status"] for row in found["saes"]} == {"done"}
    assert len(found["steps"]) == 6 * 20 * 3
    assert len(found["sweep_saes"]) == 6


def test_features_are_replaced_as_a_whole(tracker: Tracker, address: str) -> None:
    sweep = samples.sweep()
    tracker.start_sweep(sweep)
    sae = sweep["sae_ids"][0]
    found = [row | {"index": index} for index in range(12_000) for row in samples.features()[:1]]
    tracker.record_features(sae, "f.1", found)
    tracker.record_features(sae, "f.2", samples.features())
    for value in (float("nan"), float("inf")):  # of which SQLite keeps one and PostgreSQL both
        with pytest.raises(TrackingRefusedError):
            tracker.record_features(sae, "f.2", [samples.features()[0] | {"mean": value}])
    tracker.record_features(sae, "f.1", samples.features())
    rows = samples.dump(address)["features"]
    assert [(row["features_id"], row["index"]) for row in rows] == [(i, n) for i in ("f.1", "f.2") for n in range(3)]
    for row, given in zip(rows, samples.features() * 2, strict=True):
        kept = {name: row[name] for name in given}
        assert kept | {"top_tokens": json.loads(kept["top_tokens"])} == given
    with pytest.raises(TrackingError, match="no SAE 'nobody'"):
        tracker.record_features("nobody", "f.1", samples.features())
