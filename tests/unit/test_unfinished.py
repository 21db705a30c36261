"""Of what was never finished: what goes, and what stays because somebody works on it or it is not ours."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from midiscover.cli import main
from midiscover.store.local import LocalStorage
from midiscover.upkeep import garbage, remove, survey
from tests.unit.test_upkeep import GARBAGE, fill


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path)
    fill(storage)
    return storage


def test_the_old_files_of_something_that_is_still_being_made_stay(storage: LocalStorage, tmp_path: Path) -> None:
    now = time.time()
    for number in range(3):
        storage.write(f"corpora/c.00000000c2/shard-{number}.safetensors", b"t")
    for path in [*tmp_path.glob("corpora/c.00000000c2/shard-[01]*"), *tmp_path.glob("models/half/*")]:
        os.utime(path, (now - 7200, now - 7200))
    found = garbage(survey(storage), grace=3600, now=now)
    assert [one.key for one in found] == ["models/half/model.safetensors", "models/half/unfinished.json"]
    gone = {one.key for one in garbage(survey(storage), grace=3600, now=now + 3700)}
    assert gone > {f"corpora/c.00000000c2/shard-{number}.safetensors" for number in range(3)}


def test_what_people_keep_in_folders_of_our_names_stays(storage: LocalStorage, tmp_path: Path) -> None:
    """A store may be a whole bucket, or ~/data."""
    own = {
        "models/phi-2/config.json", "models/phi-2/model.safetensors", "models/a.bin", "texts/wiki/part-1.jsonl",
        "corpora/mine.jsonl", "corpora/c4/a.txt", "corpora/c.4/en/a.txt", "saes/x/parts/a", "saes/x/manifest.json",
    }  # fmt: skip
    for key in own:
        storage.write(key, b"mine")
    assert main(["store", "gc", "--grace", "0", "--store", str(tmp_path)]) == 0
    standing = set(storage.list(""))
    assert own | {"models/half/notes.md", "saes/one/exports/bundle/LICENSE"} <= standing
    assert not GARBAGE.keys() & standing


def test_what_somebody_goes_on_with_while_it_is_removed_stays(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push takes the files that an ended one has left, which are then as they were listed."""
    found = survey(storage)
    waste = [one for one in garbage(found, grace=0, now=time.time() + 60) if one.key.startswith(("models", "corpora"))]
    assert len(waste) == 3
    storage.write("models/half/manifest.json", b"{}")
    real = LocalStorage.delete
    deleted: list[str] = []

    def delete(self: LocalStorage, key: str) -> None:
        real(self, key)
        deleted.append(key)

    monkeypatch.setattr(LocalStorage, "delete", delete)
    remove(found, waste)
    assert deleted == ["corpora/c.00000000c2/shard-0.safetensors"]
    real(storage, "models/half/manifest.json")
    found = survey(storage)
    remove(found, garbage(found, grace=0, now=time.time() + 60))
    models = [key for key in deleted if key.startswith("models")]
    assert models == ["models/half/model.safetensors", "models/half/unfinished.json"], "the word goes last"


@pytest.mark.parametrize("word", [b'{"others": 5}', b'{"others": [{}]}', b"[]", b"null", b"{"])
def test_a_word_that_is_none_of_ours_ends_nothing(storage: LocalStorage, word: bytes) -> None:
    keys = {one.key for one in garbage(survey(storage), grace=0, now=time.time() + 60)}
    storage.write("models/odd/unfinished.json", word)
    waste = {one.key for one in garbage(survey(storage), grace=0, now=time.time() + 60)}
    assert {key for key in waste if not key.startswith("models/odd/")} == keys
