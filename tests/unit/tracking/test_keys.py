"""Keys: shown once, kept as hashes, good for their scopes until they are revoked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from midiscover.errors import ConfigError, NotFoundError
from midiscover.tracking.engine import Database
from midiscover.tracking.keys import SCOPES, recognised
from midiscover.tracking.tracker import Tracker
from tests.jobs_cli import refused


def test_a_key_is_known_by_its_hash_alone(address: str) -> None:
    with Tracker.open(address) as tracker:
        text = tracker.create_key("laptop", ["steer"])
        (key,) = tracker.list_keys()
    assert re.fullmatch(r"mdc_[0-9a-f]{8}_[0-9a-f]{48}", text)
    assert text.rpartition("_")[2] not in repr(key)
    assert recognised(text, [key]) == key
    assert [key.allows(scope) for scope in SCOPES] == [True, True, False]
    for wrong in (
        "",
        text[:-1],
        text + "0",
        text.upper(),
        text.replace("mdc", "abc"),
        f"{text[:-1]}{(int(text[-1], 16) + 1) % 16:x}",
    ):
        assert recognised(wrong, [key]) is None, wrong


def test_a_revoked_key_is_kept_and_refused(address: str) -> None:
    with Tracker.open(address) as tracker:
        first, second = (tracker.create_key(name, ["read"]) for name in ("one", "two"))
        gone = tracker.revoke_key("one")
        assert gone.revoked_at is not None
        keys = tracker.list_keys()
        assert [key.name for key in keys] == ["one", "two"]
        assert recognised(first, keys) is None
        assert recognised(second, keys) is not None
        with pytest.raises(NotFoundError, match=r"No valid key is called 'one'; [0-9a-f]{8} \(two\)"):
            tracker.revoke_key("one")
        tracker.revoke_key(second[4:8])
        with pytest.raises(NotFoundError, match="there are none"):
            tracker.revoke_key("two")


def test_a_transaction_whose_answer_was_lost_makes_no_second_key(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Database.write` runs its work again then."""
    real, runs = Database.write, []

    def twice(self: Database, work: Any) -> Any:
        runs.append(real(self, work))
        return real(self, work)

    with Tracker.open(address) as tracker:
        monkeypatch.setattr(Database, "write", twice)
        text = tracker.create_key("one", ["read"])
        (key,) = tracker.list_keys()
        assert recognised(text, [key]) == key
        assert tracker.revoke_key("one").revoked_at == tracker.list_keys()[0].revoked_at is not None
        assert len(runs) == 2


@pytest.mark.parametrize(
    ("name", "scopes"), [("x", ["root"]), ("x", []), (" ", ["read"]), ("a\nb", ["read"]), ("x" * 81, ["read"])]
)
def test_wrong_names_and_scopes_are_told(address: str, name: str, scopes: list[str]) -> None:
    with Tracker.open(address) as tracker:
        with pytest.raises(ConfigError):
            tracker.create_key(name, scopes)
        assert tracker.list_keys() == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["keys"], "following arguments are required"),
        (["keys", "create"], "NAME"),
        (["keys", "create", "x", "--scope", "root"], "invalid choice: 'root'"),
        (["keys", "revoke", "x"], "No valid key is called 'x'"),
        (["serve", "--port", "0"], "--port is 0"),
        (["serve", "--sae", "x", "--promoted"], "not allowed with"),
        (["serve", "--limits.texts", "0"], "limits.texts must be above 0"),
        (["serve", "--device", "tpu"], "device must be auto, cpu or cuda"),
        (["serve", "--replicas", "3", "--max_replicas", "2"], "max_replicas is below replicas"),
        (["serve", "--limits.text", "3"], "did you mean 'texts'"),
    ],
)
def test_wrong_input_is_told(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = refused(*arguments, *(["--store", str(tmp_path)] if len(arguments) > 1 else []))
    assert done.code == 2
    assert told in done.err
