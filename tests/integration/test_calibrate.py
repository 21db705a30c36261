"""Rates of this machine, measured through Ray by the command, and a plan by them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from midiscover.rates import read_rates
from midiscover.saeconfig import SAE_KINDS
from midiscover.store.local import LocalStorage
from tests.jobs_cli import midiscover
from tests.runs import write_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_machine_is_calibrated_and_a_sweep_planned_by_it(tmp_path: Path) -> None:
    config, store = write_run(tmp_path, grid={}), tmp_path / "store"
    done = midiscover("calibrate", str(config), "--store", str(store), timeout=500)
    assert done.code == 0, done.err
    assert f"CPU: kept in {store}/rates/cpu.json" in done.out
    assert "step of jumprelu" in done.out
    rates = read_rates(LocalStorage(store), "cpu")
    assert set(rates.steps) == set(SAE_KINDS)
    assert rates.threads == 1, "as resources.threads says"
    numbers = [value for value in dataclasses.asdict(rates).values() if isinstance(value, float)]
    assert all(number > 0 for number in [*numbers, *rates.starts.values()])
    for kind, cost in rates.steps.items():
        assert 0 < cost.seconds(rows=48, d_sae=96, tokens=1024, l0=10) < 10, kind
    # Only what was kept is left, and the tracker of a new store.
    assert [key for key in LocalStorage(store).list("") if not key.startswith("tracker")] == ["rates/cpu.json"]
    planned = midiscover("plan", str(config), "--store", str(store), "--json")
    assert planned.code == 0, planned.err
    (plan,) = json.loads(planned.out)
    assert plan["rates"]["measured"] == rates.measured
    assert {stage["name"] for stage in plan["stages"]} == {"start", "harvest", "train", "evaluate", "report"}
