"""schemathesis over the description of the API: no answer that it does not describe, no 5xx, no way past the key."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.served import Served, served, store_to_serve

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
__all__ = ["store_to_serve"]  # a fixture
HOST = {"Host": "testserver"}
EXAMPLES = 25
"""Requests a route; the deployment's bugs of this kind are found by the first few."""


@pytest.fixture(scope="module")
def api(store_to_serve: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    copy = tmp_path_factory.mktemp("fuzz") / "store"
    shutil.copytree(store_to_serve, copy)
    with served(copy, limits={"new_tokens": 4}) as one:
        yield one


def test_every_answer_is_one_that_is_described(api: Served) -> None:
    """Every route but those that start jobs, which test_serve_api.py asks one by one."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", api.client.app, headers=HOST | api.headers("steer"))
    failures = []
    for result in schema.exclude(path_regex="^/(jobs|train)").get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            # Rules between members ("label or token") are beyond a schema, so what it allows may still be refused.
            case.call_and_validate(headers=HOST | api.headers("steer"), excluded_checks=[positive_data_acceptance])

        try:
            check()
        except BaseExceptionGroup as error:  # of one route; the others are asked all the same
            failures.append(f"{operation.label}: {error.exceptions}")
    assert failures == [], "\n\n".join(failures)
