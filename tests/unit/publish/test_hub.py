"""Pushes to a hub, by the real client against a stand-in for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml

from midiscover.errors import UserError
from midiscover.publish.hub import push, repository_of, require_token
from tests.hub import TOKEN, Hub, hub

# The client's own LFS upload uses a form of its HTTP library that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"cfg.json": b'{"d_in": 6}', "sae_weights.safetensors": bytes(range(256)) * 20, "README.md": b"# an SAE\n"}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub() as found:
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield found


def test_each_sae_gets_a_folder_in_one_commit(stand_in: Hub) -> None:
    address = push(FILES, "l1.first", "lab/saes")
    assert address == f"{stand_in.url}/lab/saes/tree/main/l1.first"
    held = stand_in.files["lab/saes"]
    assert {name: held[f"l1.first/{name}"] for name in FILES} == FILES
    assert b'SAE.from_pretrained("lab/saes", "<folder>")' in held["README.md"]
    assert [commit[:2] for commit in stand_in.commits] == [("lab/saes", "Add l1.first")]
    # The weights went by LFS, the rest in the commit itself.
    assert list(stand_in.objects.values()) == [FILES["sae_weights.safetensors"]]


def test_a_licence_stands_in_the_head_of_a_new_readme(stand_in: Hub) -> None:
    push(FILES, "l1.first", "lab/saes")
    push(FILES, "l1.first", "lab/licensed", "cc-by-4.0")
    free, licensed = (stand_in.files[name]["README.md"].decode() for name in ("lab/saes", "lab/licensed"))
    assert "license" not in free
    assert yaml.safe_load(licensed.split("---")[1])["license"] == "cc-by-4.0"


def test_a_readme_that_somebody_wrote_stays(stand_in: Hub) -> None:
    stand_in.files["lab/saes"] = {"README.md": b"ours"}
    push(FILES, "l1.first", "lab/saes")
    push(FILES, "l2.second", "lab/saes")
    assert stand_in.files["lab/saes"]["README.md"] == b"ours"
    assert {name.partition("/")[0] for name in stand_in.files["lab/saes"]} == {"README.md", "l1.first", "l2.second"}


def test_a_token_that_the_hub_does_not_know(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match=r"^The hub at http://127\.0\.0\.1:\d+ refuses lab/saes: ") as told:
        push(FILES, "l1.first", "lab/saes")
    assert "hf_another" not in str(told.value)
    assert (stand_in.files, stand_in.commits) == ({}, [])


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub() as gone:
        address = gone.url
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=f"^The push to the hub at {address} failed "):
        push(FILES, "l1.first", "lab/saes")


def test_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="set HF_TOKEN to one that may write"):
        require_token()


@pytest.mark.parametrize("address", ["lab/saes", "hf://saes", "hf://lab/saes/more", "hf://../saes", "https://x/lab"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UserError, match="is no repository of a hub; give hf://organisation/repository"):
        repository_of(address)


def test_an_address() -> None:
    assert repository_of("hf://lab/sae-s.1/") == "lab/sae-s.1"


def test_the_stand_in_refuses_what_never_came(stand_in: Hub) -> None:
    """Else a push that lost its weights would pass for one that arrived."""
    stand_in.files["lab/saes"] = {}
    line = json.dumps({"key": "lfsFile", "value": {"path": "w", "algo": "sha256", "oid": "0" * 64, "size": 1}})
    headers = {"Authorization": f"Bearer {TOKEN}"}
    asked = Request(f"{stand_in.url}/api/models/lab/saes/commit/main", line.encode(), headers)
    with pytest.raises(HTTPError, match="400"):
        urlopen(asked)
    assert stand_in.files["lab/saes"] == {}
