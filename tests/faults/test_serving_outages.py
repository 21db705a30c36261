"""A deployment whose store, and whose database, are away for a minute: R15 of the reliability goals, and R23 here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import requests

from midiscover.store.storage import open_store
from tests.faults.s3proxy import FaultProxy
from tests.faults.test_serving import load
from tests.postgres import Server, fresh_database, or_skip, own_server
from tests.s3 import s3_server
from tests.served import store_to_serve
from tests.serving import Deployment, deployed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.postgres, pytest.mark.timeout(900)]
__all__ = ["store_to_serve"]  # a fixture
AWAY = 60.0


class Running(NamedTuple):
    deployment: Deployment
    proxy: FaultProxy
    database: Server
    saes: list[str]


@pytest.fixture(scope="module")
def running(store_to_serve: Path) -> Iterator[Running]:
    """The store behind a proxy that can be told to drop every connection; keys in a database of its own."""
    with (
        or_skip(),
        own_server() as database,
        fresh_database(database.url) as address,
        s3_server() as server,
        FaultProxy(server.endpoint) as proxy,
    ):
        with patch.dict("os.environ", server.environment):
            there, here = open_store(server.uri("store")), open_store(str(store_to_serve))
            for key in here.list(""):
                if not key.startswith("tracker"):
                    there.write(key, here.read(key))
        behind = server.environment | {"MIDISCOVER_DATABASE_URL": address, "AWS_ENDPOINT_URL": proxy.endpoint}
        with deployed(server.uri("store"), "--refresh_seconds", "1", "--limits.seconds", "15", env=behind) as one:
            saes = sorted(sae["id"] for sae in one.get("/saes").json()["saes"])
            yield Running(one, proxy, database, saes)


def asked(one: Deployment, sae: str) -> int:
    return one.post("/interpret", {"text": "The river ran.", "sae": sae}).status_code


def test_a_store_that_is_away_for_a_minute_silences_only_what_was_never_read(running: Running) -> None:
    one, known, unknown = running.deployment, running.saes[0], running.saes[-1]
    assert asked(one, known) == 200
    assert one.get(f"/features/{known}").status_code == 200
    with load(one) as answers:
        time.sleep(3)
        broken = running.proxy.broken["down"]
        running.proxy.down = True
        at = time.monotonic()
        told: Counter[int] = Counter()
        while time.monotonic() < at + AWAY:
            assert asked(one, known) == 200
            assert one.get(f"/features/{known}").status_code == 200
            began = time.monotonic()
            told[asked(one, unknown)] += 1
            assert time.monotonic() - began < 25
            time.sleep(1)
        running.proxy.down = False
        back = time.monotonic()
    assert running.proxy.broken["down"] - broken > 5, "the store was asked for while it was away"
    assert set(told) == {503}, told
    during = [answer for answer in answers if at < answer.at < back]
    assert len(during) > 20
    assert {answer.status for answer in during} == {200}
    while asked(one, unknown) != 200:
        assert time.monotonic() < back + 60
        time.sleep(0.5)
    print(f"what was not read before answers {time.monotonic() - back:.1f} s after the store is back")


def test_a_database_that_is_away_for_a_minute_is_not_noticed(running: Running) -> None:
    """Keys are known, features come from the store; a key that nobody made is refused all the same."""
    one = running.deployment
    assert asked(one, running.saes[0]) == 200
    running.database.stop()
    try:
        at, count = time.monotonic(), 0
        while time.monotonic() < at + AWAY:
            assert asked(one, running.saes[0]) == 200
            assert one.get(f"/features/{running.saes[0]}").status_code == 200
            wrong = {"Authorization": "Bearer mdc_00000000_" + "0" * 48}
            assert requests.get(f"{one.address}/saes", headers=wrong, timeout=20).status_code == 401
            count += 1
            time.sleep(0.5)
        assert count > 20
        refused = one.get("/runs")
        assert refused.status_code == 503, refused.text  # the one thing that only the database knows
    finally:
        running.database.start()
    ends = time.monotonic() + 60
    while one.get("/runs").status_code != 200:
        assert time.monotonic() < ends
        time.sleep(0.5)
