"""The main job with its store in a bucket and its tracker in PostgreSQL: the same bytes as in a folder with SQLite.

The bucket is SeaweedFS's, the database a real PostgreSQL; see `tests.s3` and `tests.postgres`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import boto3.session
import pytest
import torch

from midiscover import load_sae
from midiscover.store.s3 import S3Storage
from midiscover.store.storage import Storage, open_store
from tests.jobs_cli import Done, midiscover
from tests.postgres import fresh_database
from tests.runs import blocks, weights, write_run, write_text
from tests.s3 import S3Server, s3_server

# The first test waits for three jobs and two servers.
pytestmark = [
    pytest.mark.alone,
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


class Place(NamedTuple):
    """Where a run keeps its things, and what it says and leaves there."""

    uri: str
    env: dict[str, str]
    folder: Path
    """The working directory of its commands."""

    def run(self, *arguments: str) -> Done:
        """A verb that succeeds."""
        done = midiscover(*arguments, "--store", self.uri, cwd=self.folder, env=self.env)
        assert done.code == 0, done.err
        return done

    def json(self, *arguments: str) -> Any:
        """What a verb says with --json."""
        return json.loads(self.run(*arguments, "--json").out)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """A bucket that this process and the jobs can reach."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def other_database(postgres_url: str) -> Iterator[str]:
    with fresh_database(postgres_url) as url:
        yield url


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose text is a folder of three files."""
    folder = tmp_path_factory.mktemp("run")
    lines = write_text(folder / "text.jsonl").read_text().splitlines()
    (folder / "texts").mkdir()
    for i in range(3):
        (folder / "texts" / f"part-{i}.jsonl").write_text("\n".join(lines[i * 140 : (i + 1) * 140]))
    return write_run(folder, corpus={"source": str(folder / "texts"), "context_size": 32})


@pytest.fixture(scope="module")
def local(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The run in a folder, with SQLite."""
    folder = tmp_path_factory.mktemp("local")
    place = Place(str(folder / "store"), {}, folder)
    place.run("sweep", str(config), "--tag", "first")
    return place


@pytest.fixture(scope="module")
def remote(
    config: Path, server: S3Server, postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The same run in a bucket, with PostgreSQL and a new cache; the model comes from the bucket as well.

    Its harvest was a job of its own.
    """
    home = tmp_path_factory.mktemp("home")
    with fresh_database(postgres_url) as url:
        env = server.environment | {"MIDISCOVER_DATABASE_URL": url, "MIDISCOVER_HOME": str(home)}
        place = Place(server.uri("team/store"), env, tmp_path_factory.mktemp("remote"))
        stored = place.run("model", "push", str(config.parent / "model-llama")).out.strip()
        assert stored == "store:model-llama"
        place.run("harvest", str(config), "--model.id", stored)
        assert list(home.glob("models/model-llama-*/model.safetensors"))  # fetched by the worker
        swept = place.run("sweep", str(config), "--model.id", stored, "--tag", "first")
        assert "until the first batch was done" not in swept.err  # no forward pass for blocks that stand
        assert swept.out.strip().endswith("report.html")
        yield place


@pytest.fixture
def bucket(remote: Place) -> Iterator[S3Storage]:
    storage = open_store(remote.uri)
    assert isinstance(storage, S3Storage)
    yield storage
    storage.close()


def sae_files(storage: Storage) -> dict[str, str]:
    """sha256 of what a sweep says of its SAEs, but for the files that hold times."""
    timed = ("/record.json", "/training.json")
    keys = [key for key in storage.list("saes") if not key.endswith(timed)]
    return {key: hashlib.sha256(storage.read(key)).hexdigest() for key in keys}


def modified(server: S3Server, prefix: str) -> dict[str, datetime]:
    """When each object of results was last written, even with the same bytes; the report is written by every run."""
    client = boto3.session.Session().client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=server.bucket, Prefix=prefix)
    found = {item["Key"]: item["LastModified"] for page in pages for item in page.get("Contents", [])}
    client.close()
    return {key: time for key, time in found.items() if "/sweeps/" not in key}


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_blocks_weights_and_metrics_are_the_same_bytes(local: Place, remote: Place, bucket: S3Storage) -> None:
    assert len(weights(bucket)) == 4
    assert weights(bucket) == weights(local.uri)
    assert len(blocks(bucket)) > 6
    assert blocks(bucket) == blocks(local.uri)
    assert sae_files(bucket) == sae_files(open_store(local.uri))


def test_the_bucket_holds_the_sweep_and_no_leftovers(remote: Place, bucket: S3Storage) -> None:
    (sweep,) = {key.split("/")[1] for key in bucket.list("sweeps")}
    names = {key.removeprefix(f"sweeps/{sweep}/") for key in bucket.list(f"sweeps/{sweep}")}
    assert names >= {"sweep.json", "report.html", "frontier.png"}
    assert not [name for name in names if name.startswith("packs/")]
    assert not bucket.exists("tracker.db")
    assert list(remote.folder.iterdir()) == []  # a store in a bucket leaves nothing where it is called from


def test_the_second_run_does_nothing(config: Path, remote: Place, server: S3Server) -> None:
    before = modified(server, "team/store/")
    again = remote.run("sweep", str(config))
    after = modified(server, "team/store/")
    assert len(before) > 20
    assert after == before
    assert "tokens/s" not in again.err  # neither a forward pass nor a step
    assert again.seconds < 30


def test_runs_from_postgres_are_those_from_sqlite(local: Place, remote: Place) -> None:
    (here,), (there,) = local.json("runs", "list"), remote.json("runs", "list")
    assert there["id"] == here["id"]
    found, locally = (place.json("runs", "compare", run["id"]) for place, run in ((remote, there), (local, here)))
    compared = found["saes"]
    assert len(compared) == 4
    assert without_times(compared) == without_times(locally["saes"])
    assert found["stability"] == locally["stability"] != []
    assert "FVU" in remote.run("runs", "compare", there["id"]).out
    assert "first" in remote.run("runs", "show", there["id"]).out
    assert compared[0]["sae_id"] in remote.run("runs", "show", compared[0]["sae_id"]).out


def test_another_database_is_filled_from_the_bucket(remote: Place, other_database: str) -> None:
    moved = remote._replace(env=remote.env | {"MIDISCOVER_DATABASE_URL": other_database})
    assert moved.json("runs", "list") == []
    moved.run("runs", "reindex")
    (sweep,) = moved.json("runs", "list")
    assert moved.json("runs", "compare", sweep["id"]) == remote.json("runs", "compare", sweep["id"])


def test_text_from_a_prefix_gives_the_blocks_of_the_same_text_in_a_folder(
    config: Path, remote: Place, server: S3Server, bucket: S3Storage
) -> None:
    texts = open_store(server.uri("texts/prose"))
    assert isinstance(texts, S3Storage)
    for path in (config.parent / "texts").iterdir():
        texts.write(path.name, path.read_bytes())
    texts.close()
    other = remote._replace(uri=server.uri("team/other"))
    hook = "model.layers.0.mlp.down_proj"
    other.run("harvest", str(config), "--corpus.source", server.uri("texts/prose"), "--harvest.hooks", hook)
    storage = open_store(other.uri)
    assert isinstance(storage, S3Storage)
    made = blocks(storage)
    storage.close()
    # The corpus has another id, because a bucket's objects are told apart by version and not by content.
    assert len(made) > 3
    assert set(made.values()) <= set(blocks(bucket).values())


def test_an_sae_is_loaded_from_its_address(local: Place, remote: Place) -> None:
    sae_id = sorted(weights(local.uri))[0]
    ours = load_sae(sae_id, store=local.uri)
    x = torch.randn(5, ours.module.d_in)
    for theirs in (load_sae(f"{remote.uri}/saes/{sae_id}"), load_sae(sae_id[:-4], store=remote.uri)):
        assert theirs.record is not None
        assert theirs.record["id"] == sae_id
        assert torch.equal(theirs.encode(x), ours.encode(x))


@pytest.mark.parametrize("verb", ["sweep", "harvest"])
def test_a_bucket_without_a_database_is_refused(config: Path, server: S3Server, tmp_path: Path, verb: str) -> None:
    done = midiscover(
        verb, str(config), "--store", server.uri("nothing-here"), cwd=tmp_path, env=server.environment, timeout=60
    )
    assert done.code == 2
    assert "MIDISCOVER_DATABASE_URL" in done.err
    assert "Traceback" not in done.err
    assert done.seconds < 5
    storage = open_store(server.uri("nothing-here"))
    assert isinstance(storage, S3Storage)
    assert storage.list("") == []
    storage.close()
    assert list(tmp_path.iterdir()) == []
