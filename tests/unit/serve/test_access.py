"""The keys of a deployment, as the tracker has them."""

from __future__ import annotations

import time

from midiscover.tracking.keys import ApiKey
from serve.access import Access
from tests.unit.serve.test_guard import api_key, text_of


def test_keys_stay_good_while_the_database_is_away() -> None:
    calls = 0

    def load() -> list[ApiKey]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError("away")
        return [api_key("read")]

    access = Access(load)
    access.refresh()
    access.watch(0.01)
    deadline = time.monotonic() + 30
    while calls <= 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    access.close()
    assert calls > 2
    assert access.away_since is not None
    assert access.key(text_of("read")) is not None
