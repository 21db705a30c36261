"""Every check fails on a folder that is broken in just its way, and no other one does."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midiscover.errors import StoreError
from midiscover.publish.checks import REGISTRY
from midiscover.publish.verify import Report, subject_of_folder, verify
from tests.unit.publish import folders
from tests.unit.publish.breakers import ALSO, BARE, FULL, TOPK, Breaker

SAELENS = ("saelens_loads_it", "saelens_encodes_alike", "saelens_decodes_alike")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores with one SAE: alone, with all that belongs to it, and a TopK SAE."""
    root = tmp_path_factory.mktemp("stores")
    full = folders.write_sae(root / "full")
    folders.add_features(root / "full", full)
    folders.add_exports(root / "full", full)
    folders.write_sae(root / "bare")
    shutil.rmtree(root / "bare" / "activations")
    folders.write_sae(root / "topk", "topk")
    return {name: root / name for name in ("full", "bare", "topk")}


def copied(store: Path, to: Path) -> Path:
    """The SAE's folder in a copy of a store."""
    shutil.copytree(store, to / "store")
    return to / "store" / "saes" / folders.SAE


def checked(folder: Path) -> Report:
    return verify(subject_of_folder(str(folder)))


def failed(report: Report) -> dict[str, str]:
    return {outcome.name: outcome.detail for outcome in report.outcomes if outcome.status == "fail"}


def test_there_are_enough_checks_and_each_says_what_it_asserts() -> None:
    assert len(REGISTRY) >= 32
    assert len({check.name for check in REGISTRY}) == len(REGISTRY)
    assert all(check.asserts for check in REGISTRY)


def test_every_check_is_broken_once() -> None:
    assert {check.name for check in REGISTRY} == {*BARE, *FULL, *TOPK, *SAELENS}


def test_whole_folders_pass(originals: dict[str, Path]) -> None:
    for name, expected in (("full", 0), ("bare", 0), ("topk", 0)):
        report = checked(originals[name] / "saes" / folders.SAE)
        assert (failed(report), report.count("fail")) == ({}, expected)
    report = checked(originals["full"] / "saes" / folders.SAE)
    skipped = {outcome.name for outcome in report.outcomes if outcome.status == "skipped"}
    assert skipped == {"k_is_possible", *SAELENS}


@pytest.mark.parametrize(
    ("store", "name", "breaker"),
    [
        (store, name, breaker)
        for store, all_of in (("bare", BARE), ("full", FULL), ("topk", TOPK))
        for name, breaker in all_of.items()
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_folder_fails_one_check(
    originals: dict[str, Path], tmp_path: Path, store: str, name: str, breaker: Breaker
) -> None:
    folder = copied(originals[store], tmp_path)
    breaker(folder)
    found = failed(checked(folder))
    assert sorted(found) == sorted([name, *ALSO.get(name, [])]), found
    assert found[name], "it says what is wrong"
    assert "can't be checked" not in found[name]


FAKE = """
import json, sys
from safetensors.torch import load_file, save_file
sys.path[:0] = {paths!r}
from midiscover import load_sae
_, _, folder, given, answer = sys.argv[1:]
tensors, sae = load_file(given), load_sae(folder)
found = {{"features": sae.encode(tensors["x"]), "x_hat": sae.decode(tensors["features"])}}
{change}
save_file(found, answer)
print("6.0 FakeSAE")
"""


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ("", []),
        ("raise ValueError('no such architecture')", ["saelens_loads_it"]),
        ("found['features'][0, 3] += 1e-3", ["saelens_encodes_alike"]),
        ("found['x_hat'] = found['x_hat'][:, :-1].contiguous()", ["saelens_decodes_alike"]),
    ],
)
def test_saelens_is_asked(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, fails: list[str]
) -> None:
    (tmp_path / "fake.py").write_text(FAKE.format(paths=[str(Path(__file__).parents[3])], change=change))
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/fake.py "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("MIDISCOVER_SAELENS_PYTHON", str(fake))
    report = checked(originals["bare"] / "saes" / folders.SAE)
    assert list(failed(report)) == fails
    if not fails:
        assert {outcome.status for outcome in report.outcomes if outcome.group == "saelens"} == {"pass"}


def test_an_export_is_verified_by_itself(originals: dict[str, Path], tmp_path: Path) -> None:
    exports = originals["full"] / "saes" / folders.SAE / "exports"
    for kind in ("saelens", "neuronpedia", "bundle"):
        copy = shutil.copytree(exports / kind, tmp_path / kind)
        report = checked(copy)
        assert (report.kind, failed(report)) == (kind, {})
        assert report.count("pass") >= 2
    (tmp_path / "saelens" / "README.md").write_text("changed")
    shutil.rmtree(tmp_path / "neuronpedia" / "v1" / "phi-2" / "1-mdc-mlp-40" / "features")
    (tmp_path / "bundle" / "sae_model.pt").unlink()
    assert list(failed(checked(tmp_path / "neuronpedia"))) == [
        "neuronpedia_export_is_whole",
        "neuronpedia_rows_follow_the_rules",
    ]
    assert list(failed(checked(tmp_path / "bundle"))) == ["bundle_is_whole", "seed_files_are_there"]


def test_the_seed_projects_own_files_pass(tmp_path: Path, originals: dict[str, Path]) -> None:
    weights = folders.weights_of(originals["topk"] / "saes" / folders.SAE)
    report = checked(folders.write_bundle(tmp_path / "seed", {}, weights, own=False))
    assert (report.kind, failed(report)) == ("bundle", {})
    skipped = {outcome.group for outcome in report.outcomes if outcome.status == "skipped"}
    assert skipped == {
        "cfg",
        "weights",
        "sparsity",
        "record",
        "saelens",
        "exports",
        "bundle",
    }  # it has none of our files
    assert [
        outcome.name for outcome in report.outcomes if outcome.group == "bundle" and outcome.status == "skipped"
    ] == ["seed_model_is_this_sae"]


def test_what_is_no_sae_at_all_is_refused(tmp_path: Path) -> None:
    from midiscover.errors import UserError

    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(UserError, match="neither an SAE nor an export: it holds no cfg.json"):
        subject_of_folder(str(tmp_path))


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_damaged_folder_never_ends_the_others(originals: dict[str, Path], tmp_path: Path) -> None:
    """Whatever JSON stands in a file, every check says something of it."""
    folder = copied(originals["full"], tmp_path)
    nonsense = [None, "text", -1, {"a": [None]}]
    for name in ("cfg.json", "record.json", "training.json"):
        whole = json.loads((folder / name).read_text())
        for key in whole:
            for value in nonsense:
                (folder / name).write_text(json.dumps(whole | {key: value}))
                report = verify(
                    subject_of_folder(str(folder)), ("files", "cfg", "weights", "sparsity", "record", "training")
                )
                assert report.count("pass") > 10
        (folder / name).write_text(json.dumps(whole))


def test_a_part_of_a_folder_that_may_not_be_read_is_not_missing(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "alone" / "sae"
    shutil.copytree(originals["full"] / "saes" / folders.SAE, folder)
    real = os.scandir

    def scandir(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(path) == folder / "features":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[return-value]

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StoreError, match=f"in the store {folder}: Permission denied"):
        checked(folder)
