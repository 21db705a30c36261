"""A deployment and its store: cut models, SAEs that come, go or are damaged, and a store that stays away."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from midiscover.errors import StoreFailedError
from midiscover.store.local import LocalStorage
from tests.served import Served, api, served, store, store_to_serve

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
__all__ = ["api", "store", "store_to_serve"]  # fixtures

TEXTS = ["The river ran past the old mill.", "Entry 12: stone lamp engine."]


def test_without_steering_the_model_is_cut_and_answers_the_same(api: Served, store: Path) -> None:
    shallow = [name for name in api.saes if name.startswith("l0")]
    with served(store, saes=shallow, steering=False) as cut:
        assert len(list(cut.interpreter.lm.model.get_submodule("model.layers").children())) == 1
        body = {"texts": TEXTS, "sae": shallow[0]}
        assert cut.post("/interpret", body).json() == api.post("/interpret", body).json()
        refused = cut.post("/steer", {"prompt": "a", "features": [{"feature": 1}]}, "steer")
        assert refused.status_code == 422
        assert "set steering" in refused.json()["detail"]


def test_a_deeper_sae_that_is_promoted_later_is_answered(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    names = sorted(path.name for path in (copy / "saes").iterdir())

    def promote(*saes: str) -> None:
        entries = [{"id": name, "hook": "h", "sweep": None} for name in saes]
        (copy / "promoted.json").write_text(json.dumps({"v": 1, "saes": entries, "updated": "now"}))

    promote(names[0])
    with served(copy, saes=["promoted"], steering=False) as one:
        assert one.saes == [names[0]]
        assert one.post("/interpret", {"text": "a", "sae": names[2]}).status_code == 404
        promote(names[0], names[2])
        one.context.catalog.refresh()
        assert one.post("/interpret", {"text": "a", "sae": names[2]}).status_code == 200
        promote()
        one.context.catalog.refresh()
        assert "No SAE is hosted" in one.post("/interpret", {"text": "a"}).json()["detail"]


def test_a_hostile_sae_is_refused_with_the_reason_and_the_rest_goes_on(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    names = sorted(path.name for path in (copy / "saes").iterdir())
    weights = copy / "saes" / names[0] / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (copy / "saes" / names[1] / "record.json").write_text('{"sae": []}')
    (copy / "saes" / names[2] / "record.json").write_text("not json")
    with served(copy) as one:
        listed = one.get("/saes").json()
        assert [sae["id"] for sae in listed["saes"]] == [names[0], names[3]]
        assert set(listed["broken"]) == {names[1], names[2]}
        assert one.client.get("/health").json()["status"] == "degraded"
        damaged = one.post("/interpret", {"text": "a", "sae": names[0]})
        assert damaged.status_code == 503
        assert "differ from those that were committed" in damaged.json()["detail"]
        assert one.post("/interpret", {"text": "a", "sae": names[3]}).status_code == 200


class Away(LocalStorage):
    """A store that stops answering when it is told to."""

    told: ClassVar[set[str]] = set()

    def _ask(self) -> None:
        if "away" in self.told:
            raise StoreFailedError(f"{self.uri} does not answer.")

    def read(self, *given: Any, **named: Any) -> bytes:
        self._ask()
        return super().read(*given, **named)

    def list(self, prefix: str) -> list[str]:
        self._ask()
        return super().list(prefix)

    def entries(self, prefix: str) -> Any:
        self._ask()
        return super().entries(prefix)


def test_features_written_anew_are_seen(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    with served(copy) as one:
        catalog, name = one.context.catalog, one.saes[0]
        held = catalog.features(name)
        (folder,) = (copy / "saes" / name / "features").iterdir()
        newer = shutil.copytree(folder, folder.with_name("f.0123456789"))
        manifest = json.loads((newer / "manifest.json").read_text())
        manifest |= {"features_id": newer.name, "created": "9" + manifest["created"][1:]}
        (newer / "manifest.json").write_text(json.dumps(manifest))
        catalog.renew_features()
        assert catalog.features(name) is held
        monkeypatch.setattr("serve.catalog.FEATURES_FRESH_SECONDS", 0.0)
        catalog.renew_features()
        assert catalog.features(name).manifest["features_id"] == newer.name
        renewed = catalog.features(name)
        catalog.renew_features()
        assert catalog.features(name) is renewed
        shutil.rmtree(newer)
        shutil.rmtree(folder)
        catalog.renew_features()
        assert one.get(f"/features/{name}").status_code == 404


def test_a_name_in_a_request_opens_no_config(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("midiscover.targets.find_config", opened.append)
    for name in ("quick", "demo", "run.yaml"):
        assert api.get(f"/features/{name}").status_code == 404
    assert opened == []


def test_the_store_away(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R15: what is loaded goes on being served, and says so; R20: what is not answers 503 and the rest is unharmed."""
    storage = Away(store)
    with served(storage, refresh_seconds=0.05) as one:
        one.interpreter.shelf._storage = storage
        one.context.catalog.watch()
        loaded = {"text": "The river", "sae": one.saes[0]}
        before = one.post("/interpret", loaded).json()
        (sweep,) = (run["id"] for run in one.get("/runs").json()["runs"])
        listed = one.get(f"/features/{sweep}", params={"sae": one.saes[0]}).json()
        monkeypatch.setattr("serve.catalog.FEATURES_FRESH_SECONDS", 0.0)
        storage.told.add("away")
        ends = time.monotonic() + 10
        while one.client.get("/health").json()["status"] == "ok" and time.monotonic() < ends:
            time.sleep(0.05)
        assert "the store does not answer" in one.client.get("/health").json()["reasons"][0]
        assert one.post("/interpret", loaded).json() == before
        assert one.get(f"/features/{sweep}", params={"sae": one.saes[0]}).json() == listed
        assert one.get(f"/features/{one.saes[0][:-1]}").json() == listed
        assert one.get("/features/another-sweep").status_code == 503
        assert one.get(f"/features/{one.saes[1]}").status_code == 503
        unread = one.post("/interpret", {"text": "The river", "sae": one.saes[1]})
        assert unread.status_code == 503
        feature = one.get(f"/saes/{one.saes[1]}/features/0")
        assert feature.status_code == 503
        assert str(store) not in feature.text
        storage.told.clear()
        while one.client.get("/health").json()["status"] != "ok" and time.monotonic() < ends:
            time.sleep(0.05)
        assert one.client.get("/health").json()["status"] == "ok"
        assert one.get(f"/saes/{one.saes[1]}/features/0").status_code == 200
        one.context.catalog.close()
