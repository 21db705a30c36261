"""What is promoted, what is refused and why, and two who promote at once."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from midiscover.cli import main
from midiscover.errors import CorruptError, NotFoundError
from midiscover.promoted import promoted
from midiscover.publish.promote import Limits, promote, withdraw
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from midiscover.targets import Target, find_target
from tests.unit.publish import folders

SWEEP = "tiny.0123456789"
LIMITS = Limits(max_fvu=0.25, min_l0=20, max_l0=100, max_dead=0.1)
GOOD: dict[str, Any] = {"fvu": 0.2, "l0": 40.0, "dead_share": 0.05, "ce_recovered": 0.9}


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    monkeypatch.setenv("MIDISCOVER_OWNER", "ada")
    return LocalStorage(tmp_path)


def put(
    storage: LocalStorage,
    name: str,
    hook: str = "model.layers.1.mlp",
    output_hook: str | None = None,
    *,
    control: str = "none",
    **metrics: Any,
) -> None:
    """As much of a record as promotion reads."""
    record = {
        "id": name,
        "hook": hook,
        "output_hook": output_hook or hook,
        "sae": {"control": control},
        "evaluation_id": "e.1",
        "metrics": GOOD | metrics,
    }
    storage.write(layout.record(name), json.dumps(record).encode())


def of(*names: str, evaluation: str = "e.1") -> Target:
    return Target(saes=names, sweep_id=SWEEP, record={"evaluation_id": evaluation})


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records alone, which no check would pass."""
    monkeypatch.setattr("midiscover.publish.promote.CHEAP", ())


@pytest.mark.usefixtures("verified")
def test_each_hook_gets_its_lowest_fvu_within_the_limits(storage: LocalStorage) -> None:
    put(storage, "a", fvu=0.21)
    put(storage, "b", fvu=0.19)
    put(storage, "c", fvu=0.1, l0=101.0)
    put(storage, "d", "model.layers.2.mlp", fvu=0.25, l0=20.0, dead_share=0.1)
    put(storage, "e", fvu=0.01, control="neurons")
    decision = promote(storage, of("a", "b", "c", "d", "e"), LIMITS)
    assert [entry["id"] for entry in decision.promoted] == ["b", "d"]
    assert decision.refused == {
        "a": "b has a lower FVU",
        "c": "L0 101 is above 100 by 1",
        "e": "it is a control",
    }
    document = json.loads(storage.read(layout.PROMOTED))
    assert (document["v"], list(document)) == (1, ["v", "saes", "updated"])
    first = document["saes"][0]
    assert {name: first[name] for name in ("id", "hook", "sweep", "by")} == {
        "id": "b",
        "hook": "model.layers.1.mlp",
        "sweep": SWEEP,
        "by": "ada",
    }
    assert first["metrics"] == GOOD | {"fvu": 0.19}


@pytest.mark.usefixtures("verified")
def test_every_broken_limit_is_named_with_its_distance(storage: LocalStorage) -> None:
    put(storage, "a", fvu=0.31, l0=12.0, dead_share=0.4, ce_recovered=None)
    limits = Limits(max_fvu=0.25, min_l0=20, max_l0=100, max_dead=0.1, min_ce=0.8)
    decision = promote(storage, of("a"), limits)
    assert decision.promoted == ()
    assert decision.refused == {
        "a": "FVU 0.31 is above 0.25 by 0.06; L0 12 is below 20 by 8; dead share 0.4 is above 0.1 by 0.3; "
        "CE recovered was not measured"
    }
    assert not storage.exists(layout.PROMOTED)
    put(storage, "b", fvu=float("nan"))
    assert "FVU nan is above" in promote(storage, of("b"), LIMITS).refused["b"]


@pytest.mark.usefixtures("verified")
def test_what_is_refused_and_stays_promoted_from_before_is_said(storage: LocalStorage) -> None:
    put(storage, "a", fvu=0.2)
    put(storage, "b", "model.layers.2.mlp", fvu=0.1)
    put(storage, "c", "model.layers.2.mlp", fvu=0.15)
    promote(storage, of("a", "c"), LIMITS)
    stricter = Limits(max_fvu=0.18, min_l0=20, max_l0=100, max_dead=0.1)
    decision = promote(storage, of("a", "b", "c"), stricter)
    assert [entry["id"] for entry in promoted(storage)] == ["a", "b"]
    assert decision.refused == {
        "a": "FVU 0.2 is above 0.18 by 0.02; it stays promoted from before, until --withdraw takes it out",
        "c": "b has a lower FVU",
    }
    assert withdraw(storage, "a") == ["a"]
    assert promote(storage, of("a", "b", "c"), stricter).refused["a"] == "FVU 0.2 is above 0.18 by 0.02"


@pytest.mark.usefixtures("verified")
def test_a_sweep_is_judged_by_its_own_evaluation(storage: LocalStorage) -> None:
    put(storage, "a", fvu=0.9)
    storage.write(layout.evaluation("a", "e.2"), json.dumps({"metrics": GOOD}).encode())
    assert promote(storage, of("a"), LIMITS).promoted == ()
    assert promote(storage, of("a", evaluation="e.3"), LIMITS).refused["a"].startswith("FVU was not measured")
    (entry,) = promote(storage, of("a", evaluation="e.2"), LIMITS).promoted
    assert entry["metrics"]["fvu"] == 0.2


@pytest.mark.usefixtures("verified")
def test_promoting_again_replaces_and_withdrawing_removes(storage: LocalStorage) -> None:
    put(storage, "a", fvu=0.2)
    put(storage, "b", fvu=0.22)
    put(storage, "c", "model.layers.2.mlp")
    promote(storage, of("a", "c"), LIMITS)
    promote(storage, of("b"), LIMITS)  # of the same sweep and hook as a
    assert [entry["id"] for entry in promoted(storage)] == ["b", "c"]
    promote(storage, Target(saes=("a",)), LIMITS)  # by itself: of no sweep
    assert [entry["id"] for entry in promoted(storage)] == ["a", "b", "c"]
    with pytest.raises(NotFoundError, match="Nothing that 'x' names of the promoted SAEs of .*; they are a, b, c"):
        withdraw(storage, "x")
    assert withdraw(storage, "a") == ["a"]
    assert withdraw(storage, "tiny") == ["b", "c"]
    assert promoted(storage) == []
    with pytest.raises(NotFoundError, match="Nothing is promoted in .*, so nothing can be withdrawn"):
        withdraw(storage, "tiny")


@pytest.mark.usefixtures("verified")
def test_a_transcoder_stands_beside_the_sae_that_reads_its_hook(storage: LocalStorage) -> None:
    for name, output_hook in (("sae", "mlp:in"), ("first", "mlp"), ("second", "mlp")):
        put(storage, name, "mlp:in", output_hook)
    promote(storage, of("sae"), LIMITS)
    document = json.loads(storage.read(layout.PROMOTED))
    del document["saes"][0]["output_hook"]  # as it was before entries had one
    storage.write(layout.PROMOTED, json.dumps(document).encode())
    for name in ("first", "second"):
        promote(storage, of(name), LIMITS)
        assert [entry["id"] for entry in promoted(storage)] == sorted([name, "sae"])


@pytest.mark.usefixtures("verified")
def test_a_transcoder_of_before_gives_way_to_the_next(storage: LocalStorage) -> None:
    put(storage, "first", "mlp:in", "mlp")
    put(storage, "second", "mlp:in", "mlp")
    promote(storage, of("first"), LIMITS)
    document = json.loads(storage.read(layout.PROMOTED))
    del document["saes"][0]["output_hook"]  # as it was before entries had one
    storage.write(layout.PROMOTED, json.dumps(document).encode())
    promote(storage, of("second"), LIMITS)
    assert [entry["id"] for entry in promoted(storage)] == ["second"]


@pytest.mark.usefixtures("verified")
def test_entries_that_name_no_hook_stand_in_nobodys_way(storage: LocalStorage) -> None:
    """As somebody writes them by hand: the id is enough to be served."""
    put(storage, "first", "mlp")
    put(storage, "second", "mlp")
    entries = [{"id": "absent", "sweep": SWEEP}, {"id": "first", "sweep": SWEEP}]
    storage.write(layout.PROMOTED, json.dumps({"v": 1, "saes": entries}).encode())
    promote(storage, of("second"), LIMITS)
    assert {entry["id"]: entry["hook"] for entry in promoted(storage)} == {"absent": None, "second": "mlp"}


@pytest.mark.usefixtures("verified")
def test_two_who_promote_at_once_both_succeed(storage: LocalStorage) -> None:
    """Each reads before the other writes: without the comparison one of the changes would be lost."""
    names = [f"sae-{i}" for i in range(6)]
    for i, name in enumerate(names):
        put(storage, name, f"model.layers.{i}.mlp")
    start, conflicts = threading.Barrier(len(names)), []

    class Watched(LocalStorage):
        def replace(self, key: str, old: Any, new: Any) -> bool:
            done = LocalStorage.replace(self, key, old, new)
            if not done:
                conflicts.append(key)
            return done

        def read(self, key: str, start_at: int = 0, length: int | None = None) -> bytes:
            return LocalStorage.read(self, key, start_at, length)

    def run(name: str) -> None:
        start.wait()
        promote(Watched(storage.root), of(name), LIMITS)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry["id"] for entry in promoted(storage)] == names
    assert conflicts, "the fault happened"


def test_a_damaged_sae_is_not_promoted(tmp_path: Path) -> None:
    folder = folders.write_sae(tmp_path)
    storage = LocalStorage(tmp_path)
    anything = Limits(max_fvu=1e9, min_l0=0, max_l0=1e9, max_dead=1)
    target = find_target(storage, folders.SAE[:12])
    assert [entry["id"] for entry in promote(storage, target, anything).promoted] == [folders.SAE]
    (folder / "sparsity.safetensors").write_bytes(b"\0" * 20)
    refused = promote(storage, target, anything).refused[folders.SAE]
    assert refused.startswith("it does not verify: sparsity_can_be_read: sparsity.safetensors can't be read")


def test_a_damaged_list_is_told(storage: LocalStorage) -> None:
    for text, message in (("{", "can't be read"), ('{"v": 2, "saes": []}', "has version 2; this reads 1")):
        storage.write(layout.PROMOTED, text.encode())
        with pytest.raises(CorruptError, match=message):
            promoted(storage)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    try:
        code = main(list(argv))
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    return code, out + err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.write_sae(tmp_path)
    at = ("--store", str(tmp_path))
    code, out = run(capsys, "promote", folders.SAE, "--max-fvu", "1e9", "--l0", "0..1e3", "--max-dead", "1", *at)
    assert (code, out.startswith(f"promoted: {folders.SAE}: FVU ")) == (0, True)
    for limit in (
        ("--max-fvu", "nan"),
        ("--max-fvu", "-1"),
        ("--max-dead", "nan"),
        ("--min-ce", "nan"),
        ("--min-ce", "5"),
    ):
        given = {"--max-fvu": "1", "--l0": "0..9", "--max-dead": "1"} | {limit[0]: limit[1]}
        code, out = run(capsys, "promote", folders.SAE, *(word for pair in given.items() for word in pair), *at)
        assert (code, f"{limit[0]} is {float(limit[1]):g}; it must be" in out) == (2, True)
    code, out = run(capsys, "promote", folders.SAE, "--max-fvu", "1e9", "--l0", "0..0.5", "--max-dead", "1", *at)
    assert (code, "refused: " in out, " is above 0.5 by " in out) == (1, True, True)
    assert [entry["id"] for entry in promoted(LocalStorage(tmp_path))] == [folders.SAE]
    assert run(capsys, "promote", folders.SAE, "--withdraw", *at) == (0, f"withdrawn: {folders.SAE}\n")
    for wrong, message in (
        (("--max-fvu", "1"), "Promotion needs --max-fvu, --l0 MIN..MAX and --max-dead"),
        (("--withdraw", "--max-fvu", "1"), "give it no limits"),
        (("--max-fvu", "1", "--l0", "9-3", "--max-dead", "1"), "--l0 9-3 is no range; give MIN..MAX"),
        (("--max-fvu", "1", "--l0", "9..3", "--max-dead", "1"), "--l0 9..3 is no range"),
        (("--withdraw",), f"Nothing is promoted in {tmp_path}"),
    ):
        code, out = run(capsys, "promote", folders.SAE, *wrong, *at)
        assert (code, message in out) == (2, True), out


@pytest.mark.usefixtures("verified")
def test_what_is_promoted_is_listed(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("promote", "--list", "--store", str(storage.root))
    assert run(capsys, *at) == (0, f"Nothing is promoted in {storage.uri} yet.\n")
    assert run(capsys, *at, "--json") == (0, "[]\n")
    put(storage, "a", fvu=0.19)
    put(storage, "b", "model.layers.2.mlp")
    promote(storage, of("a", "b"), LIMITS)
    entries = json.loads(storage.read(layout.PROMOTED))["saes"]
    code, out = run(capsys, *at)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    for entry, fvu in zip(entries, ("0.190", "0.200"), strict=True):
        date, _, time = entry["promoted"].partition("T")
        assert [entry["id"], entry["hook"], "40.0", fvu, date, time[:5], "ada"] in lines
    code, out = run(capsys, *at, "--json")
    assert json.loads(out) == entries


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "SWEEP|SAE|CONFIG is missing; `midiscover promote --list` shows what is promoted."),
        (("--withdraw",), "SWEEP|SAE|CONFIG is missing; `midiscover promote --list` shows what is promoted."),
        (("--list", "a"), "give it nothing but --store and --json"),
        (("--list", "--withdraw"), "give it nothing but --store and --json"),
        (("--list", "--min-ce", "0"), "give it nothing but --store and --json"),
        (("a", "--withdraw", "--json"), "--json goes with --list."),
    ],
)
def test_what_does_not_go_together(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(capsys, "promote", *words, "--store", str(tmp_path))
    assert code == 2
    assert told in out


def test_what_was_written_by_hand_ends_no_listing(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[Any] = [{"l0": "12", "fvu": 0.25}, ["l0"], None, "l0", {"l0": None, "fvu": [1]}]
    saes = [{"id": f"a{number}", "metrics": metrics} for number, metrics in enumerate(given)]
    storage.write(layout.PROMOTED, json.dumps({"v": 1, "saes": saes}).encode())
    code, out = run(capsys, "promote", "--list", "--store", str(storage.root))
    assert code == 0
    found = {line.split()[0]: line.split()[2:4] for line in out.splitlines() if line.startswith("a")}
    assert found == {"a0": ["-", "0.250"]} | {f"a{number}": ["-", "-"] for number in range(1, 5)}
