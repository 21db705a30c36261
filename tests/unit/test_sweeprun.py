"""What a sweep writes of itself before it does anything, and what others may do to its activations then. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.sweeprun import SweepRun
from midiscover.launch import parse_job, prepare
from midiscover.store import layout
from midiscover.tracking.annotations import read_annotations
from midiscover.upkeep import spent_activations, survey
from tests.runs import write_run

GRID = [{"sae.control": ["none", "random_model"]}]


class Silent:
    def say(self, text: str) -> None: ...


def started(config: Path, store: Path, *flags: str) -> SweepRun:
    """A sweep whose driver was killed before its first SAE was done."""
    with prepare(parse_job("sweep", [str(config), "--store", str(store), *flags])) as prepared:
        run = SweepRun(prepared, Silent(), None)  # type: ignore[arg-type]
        run._start()
    return run


def sweep_json(run: SweepRun) -> dict[str, Any]:
    return json.loads(run.storage.read(layout.sweep_record(run.id)))


def test_the_harvests_of_a_running_sweep_are_kept_from_others(tmp_path: Path) -> None:
    """Those of both language models, though no record names any yet."""
    config, store = write_run(tmp_path, grid=GRID, harvest={"hooks": "model.layers.0.mlp"}), tmp_path / "store"
    done = started(config, store, "--name", "done", "--resources.keep_activations", "until_done")
    storage = done.storage
    for sae in done.resolved.saes:
        record = {"lineage": {"harvest": sae.harvest_id}}
        storage.write(layout.record(sae.id), json.dumps(record).encode())
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
