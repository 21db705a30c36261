"""Pushes of models that meet, change or fail; and the list of what was pushed."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest

import midiscover.lm  # noqa: F401  so that hook tables are made in this process
from midiscover import storedmodels
from midiscover.cli import main
from midiscover.config import ModelConfig
from midiscover.errors import ModelError, StoreError, UserError
from midiscover.models import model_folder, push_model
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Bytes
from midiscover.texts import push_text
from midiscover.upkeep import garbage, survey
from tests.tiny import make_tiny_model
from tests.unit.test_storedmodels import folder, home, push, resolve, store

__all__ = ["folder", "home", "store"]  # fixtures


@pytest.mark.parametrize("at", ["config.json", "model.safetensors", "manifest.json"])
def test_of_two_pushes_under_one_name_neither_overwrites_the_other(
    folder: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The second comes while the first is about to write a file."""
    other = make_tiny_model("phi", tmp_path / "other", seed=1)
    real = LocalStorage.create
    told: list[bool] = []

    def create(self: LocalStorage, key: str, data: Bytes) -> bool:
        if key == f"models/phi/{at}" and not told:
            told.append(False)
            with pytest.raises(ModelError) if at == "manifest.json" else nullcontext():
                told[0] = push(other, store, "phi")
        return real(self, key, data)

    monkeypatch.setattr(LocalStorage, "create", create)
    first = at == "manifest.json"  # whose files all stood already
    with nullcontext() if first else pytest.raises(ModelError, match="another model by the name 'phi'.* give --name"):
        push(folder, store, "phi")
    assert told == [not first]
    winner = folder if first else other
    there = resolve("store:phi", store)
    assert there.digest == resolve(winner).digest
    assert (model_folder(there) / "model.safetensors").read_bytes() == (winner / "model.safetensors").read_bytes()


def test_what_changes_while_it_is_pushed_is_not_taken_for_what_it_was(
    folder: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the first text")
    real = LocalStorage.list

    def listed(self: LocalStorage, prefix: str) -> list[str]:
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
        text.write_text("another text")
        return real(self, prefix)

    monkeypatch.setattr(LocalStorage, "list", listed)
    with pytest.raises(UserError, match=r"config\.json has changed since it was looked at"):
        push(folder, store, "phi")
    text.write_text("the first text")
    with pytest.raises(UserError, match=r"a\.txt has changed since it was looked at"):
        push_text(str(text), str(store))
    assert not [key for key in LocalStorage(store).list("") if key.endswith(("manifest.json", "contents.json"))]


def test_an_upload_that_fails_is_told_whatever_still_holds_the_bytes(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(self: LocalStorage, key: str, data: Bytes) -> bool:
        held = memoryview(data)[:1]  # as S3's client does in the frames of its errors
        raise StoreError(f"Can't write {key}, {len(held)} bytes of it.")

    monkeypatch.setattr(LocalStorage, "create", create)
    with pytest.raises(StoreError, match=r"Can't write models/mine/.*, 1 bytes"):
        push(folder, store, "mine")


def test_the_models_of_a_store_are_listed(folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("model", "list", "--store", str(store))
    store.mkdir()
    assert main([*at]) == 0
    assert capsys.readouterr().out == f"No models in {store} yet; `midiscover model push` puts one there.\n"
    push(folder, store)
    push(folder, store, "second")
    unfinished = store / "models" / "third"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    files = [path for path in (store / "models" / "second").iterdir() if path.name != "manifest.json"]
    size = sum(path.stat().st_size for path in files)
    assert main([*at, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["id"], row["bytes"]) for row in rows] == [("store:second", size), ("store:tiny-phi", size)]
    assert [resolve(row["id"], store).digest for row in rows] == [row["digest"] for row in rows]
    assert main([*at]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["store:second", rows[0]["name"], f"{size / 1e6:.1f}"] in lines


def test_a_manifest_of_somebody_else_ends_no_listing(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(folder, store)
    manifests = {"aa": "{", "bb": '{"name": "theirs"}', "zz": '{"v": 99, "files": {}}'}
    for name, text in manifests.items():
        (store / "models" / name).mkdir()
        (store / "models" / name / "manifest.json").write_text(text)
    assert main(["model", "list", "--json", "--store", str(store)]) == 0
    out, told = capsys.readouterr()
    assert [row["id"] for row in json.loads(out)] == ["store:tiny-phi"]
    assert [line.split()[1] for line in told.splitlines()] == [f"models/{name}" for name in manifests]
    assert "emove" not in told, "of what may be somebody's"


def test_a_push_that_begins_beside_another_takes_what_it_has_put_there_for_no_stranger_s(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lists the folder when the other's word and first file stand, after it looked for that word."""
    word = store / "models" / "phi" / "unfinished.json"
    real = LocalStorage.list

    def listed(self: LocalStorage, prefix: str) -> list[str]:
        if prefix == "models/phi" and not word.exists():
            word.parent.mkdir(parents=True)
            word.write_text('{"v": 1, "others": ["notes.md"]}')
            (word.parent / "config.json").write_bytes((folder / "config.json").read_bytes())
        return real(self, prefix)

    def ended(*_: object) -> bool:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "list", listed)
        patch.setattr(storedmodels, "_put", ended)
        with pytest.raises(OSError, match="killed"):
            push(folder, store, "phi")
    assert json.loads(word.read_text())["others"] == ["notes.md"]
    waste = {one.key for one in garbage(survey(LocalStorage(store)), grace=0)}
    assert waste == {"models/phi/config.json", "models/phi/unfinished.json"}


@pytest.mark.parametrize("word", ["[]", "5", '{"others": 5}'])
def test_a_word_that_says_nothing_takes_nobody_s_files(folder: Path, store: Path, word: str) -> None:
    place = store / "models" / "phi"
    place.mkdir(parents=True)
    (place / "notes.md").write_text("mine")
    (place / "unfinished.json").write_text(word)
    model = push_model(ModelConfig(id=str(folder)), str(store), "other")[0]
    storedmodels._begin(dataclasses.replace(model, key="phi"), LocalStorage(store))
    assert json.loads((place / "unfinished.json").read_text())["others"] == ["notes.md"]
