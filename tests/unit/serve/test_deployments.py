"""How a deployment starts and follows: models that can't be loaded, and what is said of them. No Ray is started."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentStatus
from ray.serve.schema import ApplicationStatusOverview

from midiscover.errors import CorruptError, NotFoundError, StageError
from midiscover.serving import ServeArgs, ServeConfig
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.local import LocalStorage
from serve import app, replicas, together
from serve.catalog import Catalog
from tests.unit.serve.test_catalog import PLACES, write_record


@pytest.fixture
def two_models(tmp_path: Path) -> LocalStorage:
    """Two SAEs that read different language models."""
    storage = LocalStorage(tmp_path)
    for digest, sae in (("0" * 12, "a"), ("1" * 12, "b")):
        write_record(storage, sae, PLACES[sae][0], name=f"org/model-{digest[0]}")
        record = json.loads(storage.read(layout.record(sae)))
        record["lineage"]["model"]["digest"] = digest
        storage.write(layout.record(sae), dump(record))
    return storage


class Loading:
    """Stands in for an interpreter; `fails` holds an error for each model that can't be loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, storage: LocalStorage) -> None:
        self.fails: dict[str, Exception] = {}
        self.tried: list[str] = []
        catalog = Catalog(storage, ServeConfig(store=storage.uri))
        catalog.refresh()
        monkeypatch.setattr(together, "structured", lambda: None)
        monkeypatch.setattr(together, "InterpreterReplica", self._load)
        monkeypatch.setattr(together, "watched_context", lambda *_: SimpleNamespace(catalog=catalog))
        monkeypatch.setattr(together, "RequestMeter", lambda: None)
        monkeypatch.setattr(together, "HttpServer", lambda *_: SimpleNamespace(check=lambda: None))
        monkeypatch.setattr("serve.web.create_app", lambda *_: None)
        monkeypatch.setattr(together.Together, "__del__", lambda _: None)

    def _load(self, _: Any, record: dict[str, Any], label: str) -> Any:
        digest = record["lineage"]["model"]["digest"]
        self.tried.append(label)
        if digest[0] in self.fails:
            raise self.fails[digest[0]]
        return SimpleNamespace(check_health=lambda: None)


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch, two_models: LocalStorage) -> Loading:
    return Loading(monkeypatch, two_models)


@pytest.mark.parametrize("error", [NotFoundError("it is gone"), OSError("it is gone"), RuntimeError("it is gone")])
def test_a_model_that_can_t_be_loaded_takes_no_other_down(
    loading: Loading, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    loading.fails["0"] = error
    one = together.Together({"refresh_seconds": 1000.0}, ("127.0.0.1", 1))
    assert [digest[0] for digest, _ in one._models] == ["1"]
    one.check_health()
    one._load_models()
    assert loading.tried == ["model-0", "model-1"], "not again at once"
    monkeypatch.setattr(together, "AGAIN_SECONDS", 0.0)
    one._load_models()
    assert [digest[0] for digest, _ in one._models] == ["1"]
    loading.fails.clear()
    one._load_models()
    assert sorted(digest[0] for digest, _ in one._models) == ["0", "1"]
    assert one._failed == {}


def test_where_no_model_can_be_loaded_it_does_not_start_and_says_why(loading: Loading) -> None:
    loading.fails |= {"0": NotFoundError("its folder is gone"), "1": MemoryError()}
    told = "org/model-0, which a reads, can't be loaded: its folder is gone; .*model-1, .*: MemoryError"
    with pytest.raises(StageError, match=told):
        together.Together({"refresh_seconds": 1000.0}, ("127.0.0.1", 1))


def test_a_start_says_what_is_left_out_and_fails_where_nothing_is_left(
    two_models: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*saes: str) -> str:
        app.application(ServeConfig(store=two_models.uri, saes=saes), ("127.0.0.1", 1))
        return capsys.readouterr().err

    assert start("a") == ""
    assert "serve: left out: There is no config, sweep or SAE 'z'" in start("a", "z")
    with pytest.raises(NotFoundError, match="There is no config, sweep or SAE 'z'"):
        start("z")
    two_models.write(layout.PROMOTED, b'{"v": 1, "saes": [{}, {"id": "b"}]}')
    assert "serve: left out: Entry 1 of promoted.json" in start("promoted")
    two_models.write(layout.PROMOTED, b'{"v": 1, "saes": [{"id": "z"}]}')
    assert "serve: left out: z is promoted and not in the store" in start("promoted"), "which may yet come"
    two_models.write(layout.PROMOTED, b"{")
    with pytest.raises(CorruptError, match=r"promoted.json in .* can't be read"):
        start("promoted")


def test_an_application_that_did_not_start_tells_what_its_deployments_said() -> None:
    deployments: Any = {
        "together": SimpleNamespace(
            message="It failed 3 times. Error:\n  File x\n    ^^^\nStageError: gone,\nor away\n"
        ),
        "ingress": SimpleNamespace(message=""),
        "interpreter": SimpleNamespace(message="x" * 5000),
    }
    status = ApplicationStatusOverview("DEPLOY_FAILED", "Failed to update the deployments.", 0.0, deployments)  # type: ignore[arg-type]
    told = app._told(status)
    assert told == f"Failed to update the deployments. StageError: gone, or away {'x' * 600}"


class Served:
    """Stands in for Serve: an application starts where none of its interpreters is among `broken`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *broken: str) -> None:
        self.broken, self.tried, self.applications = broken, list[list[str]](), dict[str, Any]()
        monkeypatch.setattr(app.serve, "run", self._run)
        monkeypatch.setattr(app.serve, "status", lambda: SimpleNamespace(applications=self.applications))

    def _run(self, application: Any, **_: Any) -> None:
        handles = application._bound_deployment.init_args[1].values()
        names = [handle._bound_deployment.name for handle in handles]
        self.tried.append(names)
        told = {name: "its folder is gone" if name in self.broken else "" for name in names}
        status = {name: DeploymentStatus("DEPLOY_FAILED" if told[name] else "UPDATING") for name in names}
        deployments = {name: SimpleNamespace(message=told[name], status=status[name]) for name in names}
        self.applications[app.NAME] = SimpleNamespace(message="Failed.", deployments=deployments)
        if set(names) & set(self.broken):
            raise RuntimeError("Deploying application midiscover failed")


def test_an_interpreter_that_does_not_start_is_left_out(
    two_models: LocalStorage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ServeArgs(config=ServeConfig(store=two_models.uri, replicas=2), host="127.0.0.1", port=1, new_key=False)
    one, other = "interpreter-model-0", "interpreter-model-1"
    served = Served(monkeypatch, one)
    app._deploy(args)
    assert served.tried == [[one, other], [other]]
    assert "serve: left out: Failed. its folder is gone" in capsys.readouterr().err
    Served(monkeypatch, one, other)
    with pytest.raises(StageError, match=r"The application did not start: Failed\. its folder is gone"):
        app._deploy(args)


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    assert [app._place(host, 80) for host in ("::1", "127.0.0.1")] == ["[::1]:80", "127.0.0.1:80"]


@pytest.mark.parametrize("to_the_end", [True, False])
def test_numbers_are_told_at_the_end_of_steering(to_the_end: bool) -> None:
    class Inner:
        done = 0

        async def steer(self, _: Any) -> AsyncIterator[int]:
            for piece in range(3):
                self.done += 2
                yield piece

        async def facts(self) -> dict[str, Any]:
            return {"generated_tokens": self.done}

    replica, told = object.__new__(replicas.InterpreterReplica), list[dict[str, Any]]()
    replica._inner, replica._meter = Inner(), SimpleNamespace(tell=told.append)  # type: ignore[assignment]

    async def ask() -> None:
        pieces: Any = replica.steer(SimpleNamespace())  # type: ignore[arg-type]
        async for _ in pieces:
            if not to_the_end:
                break
        await pieces.aclose()

    asyncio.run(ask())
    assert told[-1] == {"generated_tokens": 6 if to_the_end else 2}
