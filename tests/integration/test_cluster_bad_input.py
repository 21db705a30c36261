"""What is wrong with a line that was meant for a cluster is told within seconds, here, and nothing is submitted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.clusters import local_cluster
from tests.jobs_cli import midiscover
from tests.runs import write_run

pytestmark = [pytest.mark.alone, pytest.mark.ray]
SECONDS = 5.0
STORE = "s3://a-bucket-that-nobody-asks/store"


class World(NamedTuple):
    config: Path
    mine: dict[str, str]
    """The environment of a user: token and address of the cluster."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("cluster")
    with local_cluster(folder, 0, {}) as cluster:
        yield World(write_run(folder), cluster.client())


def jobs(world: World) -> list[dict[str, str]]:
    done = midiscover("jobs", "list", "--json", env=world.mine)
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (("--cluster", "http://127.0.0.1:1"), {}, "The cluster at http://127.0.0.1:1 does not answer"),
        ((), {"RAY_AUTH_TOKEN": "0" * 64}, "does not take the token"),
        (("--store", "./here"), {}, "is a folder here, which the nodes don't see; give --store s3://"),
        (("--corpus.source", "./missing.jsonl"), {}, "./missing.jsonl does not exist"),
        (("--train.lrr", "1"), {}, "did you mean 'lr'"),
        (("--surprise",), {}, "'--surprise' is not a flag"),
    ],
)
def test_bad_input(world: World, arguments: tuple[str, ...], variables: dict[str, str], sentence: str) -> None:
    words = ["sweep", str(world.config), "--store", STORE, *arguments]
    before = jobs(world)
    done = midiscover(*words, cwd=world.config.parent, env=world.mine | variables)
    assert (done.code, sentence in done.err) == (2, True), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.seconds < SECONDS
    assert jobs(world) == before == []
