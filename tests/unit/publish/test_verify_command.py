"""`midiscover verify`: what it prints, its exit codes, the pictures and the archive."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from midiscover.cli import main
from tests.unit.publish import folders
from tests.unit.publish.test_promote import run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    folder = folders.write_sae(store)
    folders.add_features(store, folder)
    folders.add_exports(store, folder)
    return store


def test_by_id_and_by_folder_the_same_is_found(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, by_id = run(capsys, "verify", folders.SAE[:9], "--store", str(store))
    assert (code, by_id.splitlines()[-1]) == (0, "79 passed, 0 failed, 4 skipped")
    assert run(capsys, "verify", str(store / "saes" / folders.SAE)) == (code, by_id)
    assert "3 checks" in by_id, "those of SAELens, in one line"


def test_json_and_exit_code_of_a_broken_one(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(store, tmp_path / "store") / "saes" / folders.SAE
    (folder / "training.json").unlink()
    code, out = run(capsys, "verify", str(folder), "--json")
    report = json.loads(out)
    (broken,) = [found for found in report["checks"] if found["status"] == "fail"]
    assert (code, report["counts"]["fail"], broken["name"]) == (1, 1, "training_is_there")
    assert broken == {
        "group": "files",
        "name": "training_is_there",
        "asserts": "training.json is there",
        "status": "fail",
        "detail": "there is no training.json",
    }
    code, out = run(capsys, "verify", str(folder), "--package", "--out", str(tmp_path / "out"))
    assert (code, "is not packed: 1 checks failed" in out) == (1, True)
    assert not list((tmp_path / "out").glob("*.zip"))


def test_the_archive_is_the_same_twice_and_holds_everything(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store / "saes" / folders.SAE
    archives = []
    for name in ("a", "b"):
        assert main(["verify", str(folder), "--package", "--visualize", "--out", str(tmp_path / name)]) == 0
        archives.append(tmp_path / name / f"{folders.SAE}.zip")
    assert archives[0].read_bytes() == archives[1].read_bytes()
    assert str(archives[0]) in capsys.readouterr().out
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        ours = {f"{folders.SAE}/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
        made = {f"{folders.SAE}/{name}" for name in ("verify.json", "verify.md", "density.png", "norms.png")}
        assert (set(names), names) == (ours | made, sorted(names))
        told = json.loads(archive.read(f"{folders.SAE}/verify.json"))
        assert told["counts"] == {"pass": 79, "fail": 0, "skipped": 4}
        assert archive.read(f"{folders.SAE}/verify.md").startswith(f"# {folders.SAE}\n".encode())
        assert str(tmp_path).encode() not in archive.read(f"{folders.SAE}/verify.md")
        archive.extractall(tmp_path / "out")
    capsys.readouterr()
    assert run(capsys, "verify", str(tmp_path / "out" / folders.SAE))[0] == 0, "outside of a store it verifies as well"


@pytest.mark.parametrize("flag", ["--package", "--visualize"])
def test_nothing_is_put_into_the_folder_that_is_checked(
    store: Path, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(store, tmp_path / "store") / "saes" / folders.SAE
    before = sorted(folder.rglob("*"))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    by_id = (folders.SAE[:9], "--store", str(tmp_path / "store"))
    for arguments in (["."], [*by_id], [".", "--out", "handed-in"], [str(folder), "--out", str(tmp_path / "link")]):
        code, out = run(capsys, "verify", *arguments, flag)
        assert (code, f"lies in {folder}, which is checked; give a folder outside of it" in out) == (2, True), out
    assert sorted(folder.rglob("*")) == before
    assert run(capsys, "verify", ".", "--out", "..", flag)[0] == 0
    assert sorted(folder.rglob("*")) == before


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for argument, message in (
        ("nothing", "There is no config, sweep or SAE 'nothing'"),
        (str(tmp_path / "empty"), "is neither an SAE nor an export"),
    ):
        code, out = run(capsys, "verify", argument, "--store", str(tmp_path))
        assert (code, message in out) == (2, True), out
