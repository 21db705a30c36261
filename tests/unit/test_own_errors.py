"""What a worker raised on purpose reaches the user as its own sentence, through whatever Ray wraps it in."""

from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError

from jobs.runtime import last_line, own_error
from midiscover.errors import MiDiscoverError, StoreError, StoreFailedError


def through_ray(cause: Exception) -> Exception:
    return RayTaskError(
        "harvest", f"Traceback (most recent call last):\n  ...\nerrors.X: {cause}", cause
    ).as_instanceof_cause()


def test_an_own_error_is_found_below_ray_and_its_wrappers() -> None:
    cause = StoreFailedError("Can't write it: No space left on device.")
    there = through_ray(cause)
    assert isinstance(there, MiDiscoverError), "Ray's has the class of its cause as well"
    wrapped = RuntimeError("Failed to apply UDF")
    wrapped.__cause__ = there
    for error in (cause, there, wrapped, through_ray(wrapped)):
        found = own_error(error)
        assert found is cause
        assert str(found) == "Can't write it: No space left on device."


def test_what_ray_data_appends_is_left_out() -> None:
    longer = StoreFailedError(
        "Can't write it: No space left on device.\nFailed to apply UDF transform after 1/1 attempts."
    )
    found = own_error(through_ray(longer))
    assert isinstance(found, StoreFailedError)
    assert str(found) == "Can't write it: No space left on device."


def test_others_have_none_and_a_last_line() -> None:
    error = through_ray(ValueError("no such dtype"))
    assert own_error(error) is None
    assert last_line(error) == "errors.X: no such dtype"


@pytest.mark.parametrize(("error", "code"), [(StoreError("x"), 2), (StoreFailedError("x"), 1)])
def test_a_store_that_failed_is_not_wrong_input(error: MiDiscoverError, code: int) -> None:
    assert error.exit_code == code
