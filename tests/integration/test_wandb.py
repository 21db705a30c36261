"""wandb beside the tracker, offline: its files hold what the tracker holds, and its troubles are never the sweep's."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.mirror import Mirror
from midiscover.errors import ConfigError
from midiscover.launch import WANDB_PROJECT, wandb_project
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker
from tests.jobs_cli import ROOT, midiscover
from tests.runs import harvested_run, write_run

wandb = pytest.importorskip("wandb", reason="the extra [wandb] is not installed")

BLOCK, HEADER = 32_768, 7
HISTORY = {"step": [0, 10, 20], "l0": [9.0, 5.0, 3.0], "fvu": [1.0, 0.5, 0.25]}
RECORD = {"hook": "a.0", "layer": 0, "kind": "topk", "d_in": 4, "d_sae": 8, "sae": {"k": 2}, "train": {"lr": 0.1}}


def records(path: Path) -> Iterator[Any]:
    """wandb's protobuf records of a .wandb file: a 7-byte header, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), HEADER, b""
    assert data.startswith(b":W&B")
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no header fits into the rest of this block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class Run:
    """One .wandb file, read back."""

    def __init__(self, path: Path) -> None:
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.curves: dict[str, dict[int, float]] = {}
        self.exit_code: int | None = None
        self.id: str | None = None
        for record in records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    self.id, self.group, self.project = record.run.run_id, record.run.run_group, record.run.project
                    self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                case "history":
                    self._point(record.history.item)
                case "summary":
                    self.summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
                case "exit":
                    self.exit_code = record.exit.exit_code

    def _point(self, items: Any) -> None:
        values = {_name(item): json.loads(item.value_json) for item in items}
        for name, value in values.items():
            if name.startswith("train/"):
                self.curves.setdefault(name.removeprefix("train/"), {})[values["_step"]] = value


def _name(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def runs(folder: Path) -> dict[str, Run]:
    """Run id -> run of every .wandb file below `folder`; wandb's own process may still be writing the last ones."""
    ends = time.monotonic() + 10
    found = [Run(path) for path in folder.rglob("*.wandb")]
    while any(run.id is None or run.exit_code is None for run in found) and time.monotonic() < ends:
        time.sleep(0.2)
        found = [Run(path) for path in folder.rglob("*.wandb")]
    named = {run.id: run for run in found if run.id is not None}
    assert len(named) == len(found)
    return named


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that wandb writes to."""
    monkeypatch.setenv(WANDB_PROJECT, "mirrored")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_offline_holds_what_the_tracker_holds(finished: Path, tmp_path: Path) -> None:
    config, store, logs = harvested_run(finished, tmp_path), str(tmp_path / "store"), tmp_path / "logs"
    logs.mkdir()
    env = {WANDB_PROJECT: "mirrored", "WANDB_MODE": "offline", "WANDB_DIR": str(logs)}
    done = midiscover("sweep", str(config), "--store", store, cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    assert "wandb" not in done.err
    found = runs(logs)
    storage = open_store(store, create=False)
    with Tracker.for_store(storage) as tracker:
        (sweep,) = [row["id"] for row in tracker.list_runs()]
        rows = {key.split("/")[1]: json.loads(storage.read(key)) for key in storage.list("saes") if "record" in key}
        assert sorted(found) == sorted(rows)
        assert len(found) == 4
        for sae, run in found.items():
            assert (run.group, run.project, run.exit_code) == (sweep, "mirrored", 0)
            assert run.config["sae"]["l1_coefficient"] == rows[sae]["sae"]["l1_coefficient"]
            assert (run.config["hook"], run.config["d_sae"]) == (rows[sae]["hook"], rows[sae]["d_sae"])
            steps = tracker.steps(sae)
            for name in ("l0", "fvu", "loss", "lr"):
                assert run.curves[name] == pytest.approx(dict(zip(steps["step"], steps[name], strict=True)))
            for name in ("l0", "fvu", "ce_recovered", "dead_share"):
                assert run.summary[name] == pytest.approx(rows[sae]["metrics"][name])
    again = midiscover("sweep", str(config), "--store", store, cwd=tmp_path, env=env)
    assert again.code == 0, again.err
    assert len(runs(logs)) == 4  # nothing was made, so nothing is mirrored


def test_points_that_come_twice_are_written_once(offline: Path) -> None:
    said: list[str] = []
    mirror = Mirror("sweep-1", said.append)
    mirror.points("sae.one", {name: column[:2] for name, column in HISTORY.items()})
    mirror.points("sae.two", HISTORY)  # several runs are open at a time
    mirror.points("sae.one", {name: column[1:] for name, column in HISTORY.items()})
    metrics = {"l0": 3.5, "fvu": 0.2, "density": {"counts": [1]}, "ce_recovered": None}
    mirror.final({"id": "sae.one", "metrics": metrics} | RECORD, HISTORY)
    mirror.dropped("sae.two", "failed", "the loss was not finite at step 30")
    mirror.final({"id": "sae.three", "metrics": metrics} | RECORD, HISTORY)  # trained by an earlier process
    mirror.points("sae.four", HISTORY)
    mirror.end()
    assert said == []
    found = runs(offline)
    for sae in ("sae.one", "sae.two", "sae.three", "sae.four"):
        assert found[sae].curves == {n: dict(zip(HISTORY["step"], HISTORY[n], strict=True)) for n in ("l0", "fvu")}
        assert (found[sae].group, found[sae].project) == ("sweep-1", "mirrored")
    assert [found[f"sae.{n}"].exit_code for n in ("one", "two", "three", "four")] == [0, 1, 0, 1]
    assert {n: found["sae.one"].summary[n] for n in ("l0", "fvu", "status")} == {
        "l0": 3.5,
        "fvu": 0.2,
        "status": "done",
    }
    assert found["sae.two"].summary["reason"] == "the loss was not finite at step 30"
    assert "density" not in found["sae.one"].summary
    assert found["sae.three"].config.items() >= RECORD.items()


def test_a_wandb_that_fails_is_said_once_and_stops_nothing(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("the server is on holiday\nand so are we")

    monkeypatch.setattr(wandb, "init", refuse)
    said: list[str] = []
    mirror = Mirror("sweep-1", said.append)
    for _ in range(3):
        mirror.points("sae.one", HISTORY)
    mirror.dropped("sae.one", "failed", "x")
    mirror.end()
    assert said == ["wandb: the server is on holiday. The sweep goes on without it."]


def test_a_run_that_breaks_midway_is_said_once(offline: Path) -> None:
    said: list[str] = []
    mirror = Mirror("sweep-1", said.append)
    mirror.points("sae.one", HISTORY)
    mirror.runs["sae.one"].finish()  # as if its process had died
    mirror.final({"id": "sae.one", "metrics": {"l0": 1.0}} | RECORD, {name: [*c, 99] for name, c in HISTORY.items()})
    mirror.end()
    assert len(said) == 1
    assert said[0].endswith("The sweep goes on without it.")


@pytest.mark.parametrize("project", [None, ""])
def test_it_is_off_unless_asked_for(project: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv(WANDB_PROJECT, raising=False)
    if project is not None:
        monkeypatch.setenv(WANDB_PROJECT, project)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not even imported
    mirror = Mirror("sweep-1", pytest.fail)
    mirror.points("sae.one", HISTORY)
    mirror.end()
    assert list(tmp_path.iterdir()) == []


def test_disabled_by_wandbs_own_variable(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirror = Mirror("sweep-1", pytest.fail)
    mirror.points("sae.one", HISTORY)
    mirror.final({"id": "sae.one", "metrics": {"l0": 1.0}} | RECORD, HISTORY)
    assert runs(offline) == {}


def test_no_account_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(WANDB_PROJECT, "mirrored")
    monkeypatch.setenv("WANDB_MODE", "online")

    def refuse() -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", refuse)
    with pytest.raises(ConfigError, match="No API key configured.*WANDB_MODE=offline"):
        wandb_project()


def test_a_missing_wandb_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    absent = tmp_path / "without" / "wandb.py"
    absent.parent.mkdir()
    absent.write_text("raise ModuleNotFoundError('No module named wandb')")
    env = {WANDB_PROJECT: "mirrored", "PYTHONPATH": f"{absent.parent}:{ROOT}"}
    done = midiscover("sweep", str(config), "--store", str(tmp_path / "store"), cwd=tmp_path, env=env)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "wandb is not installed" in done.err
    assert not (tmp_path / "store").exists()
