"""What is garbage in a store and what is not, object by object; sizes against the file system."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from midiscover.cli import main
from midiscover.config import ResourcesConfig, days_of
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Storage
from midiscover.upkeep import GRACE_SECONDS, garbage, holdings, remove, spent_activations, spent_by, survey
from tests.s3 import s3_server

HOOK = "activations/h.1/model.layers.1.mlp"
A, B = "block-00000-aaaaaaaaaaaa.safetensors", "block-00000-bbbbbbbbbbbb.safetensors"


def record(harvest: str, model: str = "store:phi") -> dict[str, Any]:
    return {"lineage": {"harvest": harvest, "corpus": {"id": "c.1"}}, "config": {"model": {"id": model}}}


def sweep(name: str, saes: list[str], keep: str | None = None, harvest: str = "h.1") -> dict[str, Any]:
    resources = {} if keep is None else {"keep_activations": keep}
    return {
        "id": name, "sae_ids": saes, "harvest": harvest, "evaluation_id": "e.1", "config": {"resources": resources}
    }  # fmt: skip


def fill(storage: Storage) -> None:
    """A store in which every kind of thing stands, whole and unfinished."""
    files: dict[str, Any] = {
        "models/phi/manifest.json": {},
        "models/phi/model.safetensors": b"m" * 50,
        "models/half/unfinished.json": {"others": ["notes.md"]},
        "models/half/model.safetensors": b"m",
        "models/half/notes.md": b"mine",
        "texts/0123456789abcdef/sub/a.txt": b"t",
        "corpora/c.1/manifest.json": {},
        "corpora/c.1/shard-0.safetensors": b"t" * 10,
        "corpora/c.00000000c2/shard-0.safetensors": b"t",
        f"{HOOK}/block-00000.json": {"file": A},
        f"{HOOK}/{A}": b"a" * 1000,
        f"{HOOK}/{B}": b"b" * 900,
        f"{HOOK}/block-00001-cccccccccccc.safetensors": b"c",
        f"{HOOK}/manifest.json": {},
        "activations/h.1/tokens/manifest.json": {},
        "activations/h.2/model.layers.1.mlp/block-00000-dddddddddddd.safetensors": b"open",
        "saes/one/record.json": record("h.1"),
        "saes/one/sae_weights.safetensors": b"w" * 30,
        "saes/one/features/f.1/manifest.json": {},
        "saes/one/features/f.1/features.parquet": b"p" * 20,
        "saes/one/features/f.1/parts/0.safetensors": b"p",
        "saes/one/features/f.2/parts/0.safetensors": b"p",
        "saes/one/exports/bundle/unfinished.json": {"others": ["LICENSE"]},
        "saes/one/exports/bundle/LICENSE": b"mine",
        "saes/one/exports/bundle/cfg.json": {},
        "saes/one/exports/saelens/manifest.json": {},
        "saes/one/evaluations/e.1.json": {},
        "saes/two/record.json": record("h.1"),
        "saes/two/evaluations/e.1.json": {},
        "sweeps/s.1/sweep.json": sweep("s.1", ["one", "two"]),
        "sweeps/s.1/packs/p/step-9.safetensors": b"s",
        "sweeps/s.2/sweep.json": sweep("s.2", ["one", "absent"]),
        "sweeps/s.2/packs/p/step-9.safetensors": b"s",
        "promoted.json": {},
    }
    for key, data in files.items():
        storage.write(key, data if isinstance(data, bytes) else json.dumps(data).encode())


GARBAGE = {
    "models/half/unfinished.json": "it was never finished",
    "models/half/model.safetensors": "it was never finished",
    "texts/0123456789abcdef/sub/a.txt": "it was never finished",
    "corpora/c.00000000c2/shard-0.safetensors": "it was never finished",
    f"{HOOK}/{B}": "its marker names another writer's block",
    f"{HOOK}/block-00001-cccccccccccc.safetensors": "no marker names it",
    "saes/one/features/f.1/parts/0.safetensors": "the features it was for are written down",
    "saes/one/exports/bundle/unfinished.json": "the export was never finished",
    "saes/one/exports/bundle/cfg.json": "the export was never finished",
    "sweeps/s.1/packs/p/step-9.safetensors": "every SAE of its sweep stands",
}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path)
    fill(storage)
    return storage


def test_garbage_is_just_what_nobody_reads(storage: LocalStorage) -> None:
    found = garbage(survey(storage), grace=0, now=time.time() + 60)
    assert {one.key: one.why for one in found} == GARBAGE
    assert remove(survey(storage), found) == sum(one.bytes for one in found)
    assert garbage(survey(storage), grace=0, now=time.time() + 60) == []


def test_what_is_young_stays(storage: LocalStorage, tmp_path: Path) -> None:
    old = "corpora/c.00000000c2/shard-0.safetensors"
    now = time.time()
    os.utime(tmp_path / old, (now - 7200, now - 7200))
    assert [one.key for one in garbage(survey(storage), grace=3600, now=now)] == [old]
    assert garbage(survey(storage), grace=10_000, now=now) == []


def test_the_tokens_of_a_harvest_go_after_its_hooks(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of which a block stands is of use only with its tokens, wherever the removal is cut short."""
    for name in ("tokens", "a.hook", "z.hook"):
        for file in ("block-00000.json", A, "manifest.json"):
            storage.write(f"activations/h.1/{name}/{file}", b"{}")
    storage.write("sweeps/s.1/sweep.json", json.dumps(sweep("s.1", ["one", "two"])).encode())
    storage.delete("sweeps/s.2/sweep.json")
    found = survey(storage)
    waste = [one for one in spent_activations(found, asked=True, grace=0) if one.key.startswith("activations/h.1/")]
    deleted: list[str] = []
    monkeypatch.setattr(LocalStorage, "delete", lambda _self, key: deleted.append(key))
    remove(found, waste)
    assert set(deleted) == {key for key in storage.list("activations") if key.startswith("activations/h.1/")}
    tokens = [key.startswith("activations/h.1/tokens/") for key in deleted]
    assert tokens == sorted(tokens)
    assert sum(tokens) == 3
    for part in (True, False):
        kinds = [
            ("manifest" in key, key.endswith(".json")) for key, own in zip(deleted, tokens, strict=True) if own is part
        ]
        assert kinds == sorted(kinds, reverse=True)


def test_sizes_are_those_of_the_files(storage: LocalStorage, tmp_path: Path) -> None:
    rows = {row.what: row for row in holdings(survey(storage))}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(row.bytes for row in rows.values()) == sum(path.stat().st_size for path in files)
    assert sum(row.objects for row in rows.values()) == len(files)
    hook = list((tmp_path / HOOK).iterdir())
    assert (rows[HOOK].bytes, rows[HOOK].objects) == (sum(path.stat().st_size for path in hook), len(hook))
    assert {what: rows[what].used_by for what in (HOOK, "corpora/c.1", "models/phi", "saes/one")} == {
        HOOK: 2,
        "corpora/c.1": 2,
        "models/phi": 2,
        "saes/one": 0,
    }
    assert [row.bytes for row in holdings(survey(storage))] == sorted(
        (row.bytes for row in rows.values()), reverse=True
    )


@pytest.mark.parametrize(
    ("policies", "age_days", "asked", "gone"),
    [
        ({"s.1": (["one"], None)}, 100, False, False),
        ({"s.1": (["one"], "always")}, 100, False, False),
        ({"s.1": (["one"], "until_done")}, 0, False, True),
        ({"s.1": (["one", "absent"], "until_done")}, 100, False, False),
        ({"s.1": (["one"], "until_done"), "s.2": (["two"], "always")}, 100, False, False),
        ({"s.1": (["one"], "until_done"), "s.2": (["two"], "until_done")}, 0, False, True),
        ({"s.1": (["one"], "14d")}, 13, False, False),
        ({"s.1": (["one"], "14d")}, 15, False, True),
        ({"s.1": (["one"], "always")}, 0, True, True),
        ({"s.1": (["one", "absent"], "always")}, 0, True, False),
        ({}, 100, True, False),
    ],
)
def test_activations_go_only_where_every_sweep_lets_them(
    storage: LocalStorage, policies: dict[str, tuple[list[str], str | None]], age_days: float, asked: bool, gone: bool
) -> None:
    for name in ("s.1", "s.2"):
        storage.delete(f"sweeps/{name}/sweep.json")
    for name, (saes, keep) in policies.items():
        storage.write(f"sweeps/{name}/sweep.json", json.dumps(sweep(name, saes, keep)).encode())
    found = spent_activations(survey(storage), asked=asked, grace=0, now=time.time() + age_days * 86400 + 60)
    below = {key for key in storage.list("activations") if key.startswith("activations/h.1/")}
    assert {one.key for one in found} == (below if gone else set())


def test_a_retired_sae_is_no_unfinished_one(storage: LocalStorage) -> None:
    storage.write("sweeps/s.2/sweep.json", json.dumps(sweep("s.2", ["one", "absent"], "until_done")).encode())
    storage.write("sweeps/s.1/sweep.json", json.dumps(sweep("s.1", ["one"], "until_done")).encode())
    assert spent_activations(survey(storage), grace=0) == []
    storage.write("sweeps/s.2/retired/absent.json", b"{}")
    assert len(spent_activations(survey(storage), grace=0)) > 3


def test_a_sweep_that_measures_again_keeps_its_activations(storage: LocalStorage) -> None:
    """Its SAEs stand, measured by an older sweep in another way."""
    spent(storage)
    storage.write("sweeps/s.2/sweep.json", json.dumps(sweep("s.2", ["one", "two"], "14d")).encode())
    later = time.time() + 15 * 86400
    gone = {one.key for one in spent_activations(survey(storage), now=later)}
    assert gone == {key for key in storage.list("activations") if key.startswith("activations/h.1/")}
    again = sweep("s.2", ["one", "two"], "14d") | {"evaluation_id": "e.2"}
    storage.write("sweeps/s.2/sweep.json", json.dumps(again).encode())
    for measured in ("one", "two"):
        for asked in (True, False):
            assert spent_activations(survey(storage), asked=asked, now=later) == []
        assert spent_by(survey(storage), "s.2") == []
        storage.write(f"saes/{measured}/evaluations/e.2.json", b"{}")
    assert {one.key for one in spent_activations(survey(storage), now=later)} == gone


def test_a_document_that_cannot_be_read_keeps_what_it_owns(storage: LocalStorage) -> None:
    storage.write("sweeps/s.1/sweep.json", b"{")
    keys = {one.key for one in garbage(survey(storage), grace=0, now=time.time() + 60)}
    assert keys == GARBAGE.keys() - {"sweeps/s.1/packs/p/step-9.safetensors"}


def test_a_sweep_that_cannot_be_read_keeps_all_activations(
    storage: LocalStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spent(storage)
    assert len(spent_activations(survey(storage), grace=0)) > 3
    storage.write("sweeps/s.2/sweep.json", b"{broken")
    assert spent_activations(survey(storage), asked=True, grace=0) == []
    assert main(["store", "gc", "--activations", "--grace", "0", "--dry-run", "--store", str(tmp_path)]) == 0
    assert "sweeps/s.2/sweep.json can't be read, so all activations stay" in capsys.readouterr().out


def spent(storage: Storage) -> None:
    """The one harvest that is used is let go: by a sweep that is done."""
    storage.write("sweeps/s.1/sweep.json", json.dumps(sweep("s.1", ["one", "two"], "until_done")).encode())
    storage.delete("sweeps/s.2/sweep.json")


def test_activations_that_a_job_reads_or_has_just_written_stay(storage: LocalStorage, tmp_path: Path) -> None:
    """Features of a finished sweep harvest again what was let go, and read it for hours."""
    spent(storage)
    now = time.time()
    files = {path for path in (tmp_path / "activations/h.1").rglob("*") if path.is_file()}
    for path in (*files, *tmp_path.glob("saes/*/record.json"), *tmp_path.glob("saes/*/evaluations/*")):
        os.utime(path, (now - 7200, now - 7200))
    assert len(spent_activations(survey(storage), grace=3600, now=now)) == len(files)
    assert len(spent_by(survey(storage), "s.1")) == len(files)
    for fresh in (f"{HOOK}/{A}", layout.harvest_reader("h.1", "one")):
        storage.write(fresh, b"rows")
        os.utime(tmp_path / fresh, (now - 100, now - 100))  # after the records
        for asked in (True, False):
            assert spent_activations(survey(storage), asked=asked, grace=3600, now=now) == []
        assert spent_by(survey(storage), "s.1") == []
        os.utime(tmp_path / fresh, (now - 7200, now - 7200))
    # Somebody who said so before the sweep ended may read on for a day.
    reader = tmp_path / layout.harvest_reader("h.1", "one")
    assert spent_by(survey(storage), "s.1") == []
    for asked in (True, False):
        assert spent_activations(survey(storage), asked=asked, grace=0, now=now) == []
    os.utime(reader, (now - GRACE_SECONDS - 60, now - GRACE_SECONDS - 60))
    assert len(spent_by(survey(storage), "s.1")) == len(files) + 1
    # Not the records but an evaluation is the last word of a sweep that shares its SAEs with an older one.
    os.utime(tmp_path / HOOK / A, (now - 100, now - 100))
    assert spent_by(survey(storage), "s.1") == []
    storage.write("saes/one/evaluations/e.json", b"{}")
    assert len(spent_by(survey(storage), "s.1")) == len(files) + 1


def test_what_is_written_again_while_it_is_removed_stays(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of blocks come from their content, so a job that misses them writes the very keys that are to go."""
    spent(storage)
    found = survey(storage)
    real = LocalStorage.delete
    again: list[str] = []

    def delete(self: LocalStorage, key: str) -> None:
        real(self, key)
        if key.endswith("manifest.json") and key.startswith(HOOK):
            for name in (A, "block-00000.json", "manifest.json"):
                storage.write(f"{HOOK}/{name}", b"again")
                again.append(f"{HOOK}/{name}")

    monkeypatch.setattr(LocalStorage, "delete", delete)
    size = remove(found, spent_activations(found, grace=0))
    assert len(again) == 3
    assert set(again) == set(storage.list("activations/h.1"))
    assert 0 < size < sum(entry.bytes for entry in found.entries.values())


@pytest.mark.parametrize("how", ["sweep", "reader", "unreadable"])
def test_a_harvest_that_somebody_begins_to_use_while_it_is_removed_stays(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    spent(storage)
    found = survey(storage)
    real = LocalStorage.delete
    deleted: list[str] = []

    def delete(self: LocalStorage, key: str) -> None:
        real(self, key)
        deleted.append(key)
        if how == "reader":
            storage.write(layout.harvest_reader("h.1", "one"), b"{}")
        else:
            text = json.dumps(sweep("s.3", ["new"])) if how == "sweep" else "{"
            storage.write("sweeps/s.3/sweep.json", text.encode())

    monkeypatch.setattr(LocalStorage, "delete", delete)
    remove(found, spent_activations(found, grace=0))
    assert deleted == [f"{HOOK}/manifest.json"]


def test_files_that_killed_writers_left_are_counted_and_removed(
    storage: LocalStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, young = (tmp_path / HOOK / f".{A}.{digit * 16}" for digit in "01")
    for path in (left, young):
        path.write_bytes(b"h" * 3_000_000)
    os.utime(left, (time.time() - 90_000,) * 2)
    whole = next(row for row in holdings(survey(storage)) if row.what == HOOK)
    files = [path for path in (tmp_path / HOOK).iterdir() if path != young]
    assert (whole.bytes, whole.objects) == (sum(path.stat().st_size for path in files), len(files))
    assert main(["store", "gc", "--dry-run", "--store", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 half-written files, 3.0 MB: their writers were killed" in out
    assert "3.0 MB would go" in out
    assert left.exists()
    assert main(["store", "gc", "--store", str(tmp_path)]) == 0
    assert "3.0 MB removed" in capsys.readouterr().out
    assert not left.exists()
    assert young.exists()


def test_the_command(storage: LocalStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(storage.list(""))
    assert main(["store", "gc", "--dry-run", "--grace", "0", "--store", str(tmp_path)]) == 0
    assert "MB would go" in capsys.readouterr().out
    assert main(["store", "gc", "--dry-run", "--grace", "0", "--json", "--store", str(tmp_path)]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert set(storage.list("")) == before
    assert main(["store", "gc", "--grace", "0", "--json", "--store", str(tmp_path)]) == 0
    done = json.loads(capsys.readouterr().out)
    assert set(storage.list("")) == before - GARBAGE.keys()
    assert done == planned | {"dry_run": False}
    assert {one["key"] for one in done["waste"]} == GARBAGE.keys()
    assert done["bytes"] == sum(one["bytes"] for one in done["waste"]) > 0
    assert main(["store", "du", "--json", "--store", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["store", "du", "--store", str(tmp_path)]) == 0
    assert "activations/h.1/model.layers.1.mlp" in capsys.readouterr().out
    assert main(["store", "gc", "--grace", "-1", "--store", str(tmp_path)]) == 2


@pytest.mark.s3
def test_the_same_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    from midiscover.store.s3 import S3Storage

    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        storage = S3Storage(server.bucket, "upkeep")
        fill(storage)
        found = garbage(survey(storage), grace=0, now=time.time() + 60)
        assert {one.key: one.why for one in found} == GARBAGE
        before = set(storage.list(""))
        remove(survey(storage), found)
        assert set(storage.list("")) == before - GARBAGE.keys()
        spent(storage)
        foreign = {"upkeep/saes/.DS_Store": b"", "upkeep/models//x": b"", "upkeep/saes/.trash/record.json": b"{}"}
        for name, data in foreign.items():
            storage._client.put_object(Bucket=server.bucket, Key=name, Body=data)
        assert sum(row.bytes for row in holdings(survey(storage))) == sum(e.bytes for e in storage.entries(""))
        found = survey(storage)
        waste = spent_activations(found, grace=0)
        again = f"{HOOK}/{A}"
        time.sleep(1.1)  # a bucket's times are whole seconds, and the ETag of the same bytes is the same
        storage.write(again, b"a" * 1000)
        remove(found, waste)
        assert storage.list("activations/h.1") == [again]
        sizes = {entry.key: entry.bytes for entry in storage.entries("corpora")}
        assert sizes == {"corpora/c.1/manifest.json": 2, "corpora/c.1/shard-0.safetensors": 10}


def test_settings() -> None:
    assert [days_of(word) for word in ("always", "until_done", "14d", "0.5d")] == [None, 0, 14, 0.5]
    for word in ("never", "d", "14", "-1d", "1.2.3d", ""):
        with pytest.raises(ValueError, match="keep_activations must be always, until_done or days such as 14d"):
            ResourcesConfig(keep_activations=word)
