"""What `midiscover plan` says and refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from midiscover.cli import main
from midiscover.rates import write_rates
from midiscover.store.local import LocalStorage
from midiscover.store.storage import open_store
from tests.runs import write_run
from tests.unit.test_plan import RATES


def test_a_plan_is_printed_drawn_and_given_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, store, picture = write_run(tmp_path), tmp_path / "store", tmp_path / "plan.svg"
    store.mkdir()
    write_rates(LocalStorage(store), RATES)
    assert main(["plan", str(config), "--store", str(store), "--out", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "4 SAEs in 2 packs, about 22,707 training and 1,293 held-out tokens; rates of CPU" in told
    assert "Longest: " in told
    assert "harvest 1" in picture.read_text()
    assert "4 SAEs, about 22,707 training tokens" in picture.read_text()
    loud = tmp_path / "PLAN.PNG"
    assert main(["plan", str(config), "--store", str(store), "--out", str(loud)]) == 0
    assert loud.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["plan", str(config), "--store", str(store), "--gpus", "1,4", "--price", "2", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [plan["gpus"] for plan in plans] == [1, 4]
    for plan in plans:
        assert plan["gpu_hours"] == pytest.approx(plan["gpus"] * plan["seconds"] / 3600)
        assert plan["money"] == pytest.approx(2 * plan["gpu_hours"])
        assert (plan["activations"], set(plan["ways"])) == ("store", {"store", "stream"})
        way = plan["ways"]["store"]
        assert way["money"] == plan["money"]
        assert way["card"] == max(stage["card"] for stage in plan["stages"]) > 2**30
        assert way["written"] == sum(stage["written"] for stage in plan["stages"])
    assert main(["plan", str(config), "--store", str(store), "--simulate", "--json"]) == 0
    assert [plan["gpus"] for plan in json.loads(capsys.readouterr().out)] == [8, 64, 512]
    capsys.readouterr()
    assert main(["plan", str(config), "--store", str(store), "--gpus", "4,1,4"]) == 0
    scaled = capsys.readouterr().out.partition("On 4, 1 GPUs:")[2]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", scaled)]
    assert (len(shares), max(shares)) == (2, 100.0), "the fewest are the ideal, in whatever order they stand"
    assert main(["plan", str(config), "--store", str(store), "--gpus", "1,4", "--price", "2"]) == 0
    told = capsys.readouterr().out
    assert "rates of NVIDIA H200, reckoned from its data sheet, not measured" in told
    assert "US$" in told
    assert main(["plan", str(config), "--store", str(store), "--gpus", "1", "--price", "2"]) == 0
    assert "\nOn 1 GPU:\n" in capsys.readouterr().out


def test_each_number_of_gpus_has_its_own_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One card computes activations sooner beside the SAEs; eight share a harvest, and read the text only once."""
    config, store = write_run(tmp_path, resources={"activations": "auto"}), tmp_path / "store"
    store.mkdir()
    starts = dict.fromkeys(RATES.starts, 1.0)
    card = replace(RATES, device="card", write=5e5, model_flops=1e8, load_bytes=1e9, starts=starts)
    write_rates(LocalStorage(store), card)
    command = ["plan", str(config), "--store", str(store), "--gpus", "1,8", "--gpu", "card", "--train.epochs", "1"]
    assert main([*command, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [plan["activations"] for plan in plans] == ["stream", "store"]
    for plan in plans:
        assert plan["seconds"] == min(way["seconds"] for way in plan["ways"].values())
    assert main(command) == 0
    told = capsys.readouterr().out
    assert re.search(r"^ +1 +stream .*\n +8 +store ", told, re.MULTILINE), told
    assert re.search(r"Activations stored or streamed on 1 GPU, by resources.activations:", told)
    assert re.search(r"^stream +taken ", told, re.MULTILINE)


def test_a_plan_of_this_machine_minds_its_ram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan on cards is of other machines, whose RAM nobody knows here."""
    config, store = write_run(tmp_path, resources={"activations": "auto"}), tmp_path / "store"
    store.mkdir()
    slow_store = replace(RATES, write=1e4, read=1e4, starts=dict.fromkeys(RATES.starts, 1.0))
    for rates in (slow_store, replace(slow_store, device="card")):
        write_rates(LocalStorage(store), rates)
    command = ["plan", str(config), "--store", str(store), "--train.epochs", "1", "--json"]
    found = []
    for ram in (10**12, 10):
        monkeypatch.setattr("midiscover.cli.plan.memory", lambda ram=ram: ram)
        for words in ([], ["--gpus", "1", "--gpu", "card"]):
            assert main([*command, *words]) == 0
            (plan,) = json.loads(capsys.readouterr().out)
            found.append((plan["activations"], any("stream takes" in note for note in plan["notes"])))
    assert found == [("stream", False), ("stream", False), ("store", True), ("stream", False)]


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_fits_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    config, store = write_run(tmp_path, resources={"activations": "auto"}), tmp_path / "store"
    store.mkdir()
    assert main(["plan", str(config), "--store", str(store), "--gpus", "8,64", "--price", "3"]) == 0
    told = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in told.splitlines()[1:]) <= width
    for line in ("starting, reading the text", "loading the language model", "drawing the report"):
        assert line in told, "no cell is broken"
    assert told.count("US$") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "has no rates of cpu; it has none. `midiscover calibrate`"),
        (("--gpus", "0"), "must be numbers from 1 to 100,000"),
        (("--gpus", "2", "--gpu", "abacus"), "--gpu abacus is not known; known are h200"),
        (("--gpu", "h200"), "say how many with --gpus"),
        (("--price", "3"), "say how many with --gpus"),
        (("--gpus", "1", "--price", "0"), "--price is 0; it must be a number above 0"),
        (("--gpus", "1", "--price", "inf"), "--price is inf; it must be a number above 0"),
        (("--gpus", "8", "--simulate"), "Argument --simulate: not allowed with argument --gpus"),
        (("--gpus", "x"), "'x' must be numbers from 1 to 100,000"),
        (("--gpus", "999999999"), "must be numbers from 1 to 100,000"),
        (("--out", "plan.txt"), "--out plan.txt ends in none of .png"),
        (("--out", "/no/such/plan.png"), "There is no folder /no/such for --out; make it first."),
        (("--sea.kind", "topk"), "did you mean"),
    ],
)
def test_what_makes_no_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    (tmp_path / "store").mkdir()
    assert main(["plan", str(write_run(tmp_path)), "--store", str(tmp_path / "store"), *words]) == 2
    assert told in capsys.readouterr().err


def test_numbers_of_gpus_that_are_too_few_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(write_run(tmp_path)), "--gpu", "h100", "--resources.gpus_per_model", "4", "--json", "--gpus"]
    assert main([*words, "1,2,8"]) == 0
    out, err = capsys.readouterr()
    assert [plan["gpus"] for plan in json.loads(out)] == [8]
    assert [line.partition(":")[2][:16] for line in err.splitlines()] == [" no plan on 1 GP", " no plan on 2 GP"]
    assert main([*words, "1,2"]) == 2
    assert "needs 1 workers of 1 CPUs and 4 GPUs" in capsys.readouterr().err


def test_the_store_of_the_environment_may_lie_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    write_rates(open_store(str(tmp_path / "x")), RATES)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MIDISCOVER_STORE", "~/x")
    assert main(["plan", str(write_run(tmp_path))]) == 0
    assert "rates of CPU" in capsys.readouterr().out


def test_a_plan_on_gpus_needs_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, absent = str(write_run(tmp_path)), str(tmp_path / "later")
    assert main(["plan", config, "--gpus", "8", "--store", absent]) == 0
    assert not (tmp_path / "later").exists()
    assert main(["plan", config, "--store", absent]) == 2
    assert f"There is no store at '{absent}'" in capsys.readouterr().err
    monkeypatch.setenv("MIDISCOVER_STORE", absent)
    assert main(["plan", config]) == 2
    assert f"There is no store at {absent}, so no rates of this machine" in capsys.readouterr().err
