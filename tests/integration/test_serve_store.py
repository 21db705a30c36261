"""A deployment and its store: cut models, SAEs that come, go or are damaged, and a store that stays away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from midiscover.cutting import holds
from midiscover.errors import MiDiscoverError, StoreFailedError
from midiscover.features.records import open_features
from midiscover.store.local import LocalStorage
from serve import catalog as catalog_module
from serve.exchange import Query
from serve.hosted import Hosted
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


@pytest.mark.parametrize("by", ["text", "concept"])
def test_a_deeper_sae_that_is_promoted_later_is_answered(api: Served, store: Path, tmp_path: Path, by: str) -> None:
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
        asked = (
            {"concept": "numbers", "sae": names[2], "top_k": 3} if by == "concept" else {"text": "a", "sae": names[2]}
        )
        assert not holds(one.interpreter.lm, [one.context.hosted(names[2]).record["hook"]])
        answer, same = one.post("/interpret", asked), api.post("/interpret", asked)
        assert answer.status_code == 200
        assert _timeless(answer.json()) == _timeless(same.json())
        promote()
        one.context.catalog.refresh()
        assert "No SAE is hosted" in one.post("/interpret", {"text": "a"}).json()["detail"]


def _timeless(answer: dict[str, Any]) -> dict[str, Any]:
    """Without when each document of a concept was made, to the second."""
    for document in (answer["concept"] or {}).values():
        assert document.pop("created")
    return answer


def test_a_hostile_sae_is_refused_alone_with_the_reason_in_the_log(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("midiscover.serve"), "propagate", True)
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
        assert "can't be loaded: what the store holds of it is damaged" in damaged.json()["detail"]
        events = ("sae_broken", "sae_not_loaded")
        reasons = {line.fields["sae"]: line.fields["reason"] for line in caplog.records if line.msg in events}  # type: ignore[attr-defined]
        assert f"The weights in {copy}/saes/{names[0]} differ from those that were committed." in reasons[names[0]]
        assert f"saes/{names[2]}/record.json in {copy} is not readable as JSON" in reasons[names[2]]
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


def test_features_that_are_not_written_down_are_looked_for_every_few_seconds(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    name = sorted(path.name for path in (copy / "saes").iterdir())[0]
    shutil.move(copy / "saes" / name / "features", tmp_path / "features")
    with served(copy) as one:
        asked: list[str] = []
        opened = open_features
        monkeypatch.setattr("serve.catalog.open_features", lambda store, sae: asked.append(sae) or opened(store, sae))
        body = {"text": "The river", "sae": name}
        for _ in range(3):
            answer = one.post("/interpret", body).json()
            assert {row["label"] for row in answer["texts"][0]["saes"][name]["features"]} == {None}
            assert one.get(f"/features/{name}").status_code == 404
        assert asked == [name]
        shutil.move(tmp_path / "features", copy / "saes" / name / "features")
        monkeypatch.setattr("serve.catalog.ABSENT_SECONDS", 0.0)
        answer = one.post("/interpret", body).json()
        assert None not in {row["label"] for row in answer["texts"][0]["saes"][name]["features"]}
        assert asked == [name, name]


def test_features_are_kept_up_to_a_number_of_bytes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(store) as one:
        catalog, scanned = one.context.catalog, []
        made = catalog_module.label
        monkeypatch.setattr(
            "serve.catalog.label", lambda row: scanned.append(threading.current_thread().name) or made(row)
        )
        for _ in range(2):
            assert one.get("/search", params={"label": "peaks", "limit": 3}).json()["features"]
        assert len(scanned) == 4 * 96, "each label is made once"
        assert {name.partition("_")[0] for name in scanned} == {"asyncio"}, "by asyncio.to_thread"
        files = {name: catalog.features(name).manifest["files"]["features.parquet"]["bytes"] for name in one.saes}
        kept = sum(files[name] + catalog_module.ROW_BYTES * 96 for name in one.saes[1:])
        monkeypatch.setattr("serve.catalog.FEATURES_BYTES", kept)
        catalog._features.clear()
        for name in one.saes:
            catalog.rows(name)
        assert list(catalog._features) == list(catalog._listings) == one.saes[1:]
        monkeypatch.setattr("serve.catalog.FEATURES_BYTES", 1)
        catalog.rows(one.saes[0])
        assert list(catalog._features) == one.saes[:1]


def test_a_search_goes_past_damaged_features(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    names = sorted(path.name for path in (copy / "saes").iterdir())
    (file,) = (copy / "saes" / names[0] / "features").glob("*/features.parquet")
    file.write_bytes(b"not " + file.read_bytes())
    with served(copy) as one:
        assert one.client.get("/health").json()["status"] == "ok"
        found = one.get("/search", params={"label": "peaks", "limit": 200}).json()["features"]
        assert {row["sae"] for row in found} == set(names[1:])
        assert one.get("/search", params={"label": "peaks", "sae": names[0]}).status_code == 503
        health = one.client.get("/health").json()
        assert (health["status"], health["reasons"]) == ("degraded", ["the feature records of 1 SAEs are damaged"])


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


def asked_of_everything(one: Served, saes: Sequence[Hosted], sweep: str) -> list[Any]:
    """Answers of routes that read the store or load something of it."""
    model, source, names = saes[0].neuronpedia_model, saes[0].source, [sae.id for sae in saes]
    of, web = {"model": model, "source": source}, {"modelId": model, "source": source}
    answers = [
        one.get(path)
        for sae in (*names, "another", sweep, sweep[:2], sweep[:-1])
        for path in (
            "/health", "/saes", f"/saes/{sae}", f"/saes/{sae}/features/3", f"/features/{sae}", f"/runs/{sae}", "/runs",
            f"/features/{sae}?sae={names[0]}", f"/features/{sae}?concept=numbers", "/search?label=peaks",
            f"/search?label=peaks&sae={sae}", f"/api/feature/{model}/{source}/3", "/v1/capabilities", "/nothing",
        )
    ]  # fmt: skip
    for sae in names:
        answers += [
            one.post("/interpret", {"text": "The river", "sae": sae}),
            one.post("/interpret", {"concept": "numbers", "sae": sae}),
            one.post("/search", {"text": "The river", "sae": sae}),
            one.post("/steer", {"prompt": "a", "features": [{"sae": sae, "feature": 1}], "max_new_tokens": 2}, "steer"),
        ]
    answers += [
        one.post("/interpret", {"text": "The river", "saes": names}),
        one.post("/v1/activation/single", {**of, "prompt": "The river", "index": "3"}),
        one.post("/v1/activation/topk-by-token", {**of, "prompt": "The river"}),
        one.post("/v1/activation/source", {**of, "prompts": ["The river"]}),
        one.post("/v1/util/sae-vector", {**of, "index": 3}),
        one.post("/v1/util/sae-topk-by-decoder-cossim", {**of, "feature": {**of, "index": 7}}),
        one.post("/v1/tokenize", {"model": model, "text": "The river"}),
        one.post("/api/features", [{"modelId": model, "layer": source, "index": 3}]),
        one.post("/api/activation/get", {**web, "index": "3"}),
        one.post("/api/explanation/search", {"modelId": model, "layers": [source], "query": "peaks"}),
        one.post("/api/search-topk-by-token", {**web, "text": "The river"}),
        one.post("/train", {"config": "quick"}, "admin"),
        one.get("/jobs", "admin"),
    ]
    return answers


@pytest.mark.parametrize("fault", ["away", "damaged", "gone"])
def test_no_answer_names_the_store(store: Path, tmp_path: Path, fault: str) -> None:
    copy = tmp_path / "a-store"
    shutil.copytree(store, copy)
    storage = Away(copy)
    with served(storage, cache_bytes=0) as one:
        one.interpreter.shelf._storage = storage
        (sweep,) = (run["id"] for run in one.get("/runs").json()["runs"])
        saes = one.context.catalog.hosted
        damaged = [path for name in one.saes for path in (copy / "saes" / name).rglob("*") if path.is_file()]
        if fault == "damaged":
            for path in (*damaged, copy / "sweeps" / sweep / "sweep.json", copy / "promoted.json"):
                path.write_bytes(b"}" + path.read_bytes()[1:] if path.exists() else b"no")
        elif fault == "gone":
            for path in damaged:
                path.unlink()
        storage.told.update({"away"} if fault == "away" else ())
        answers = []
        try:
            for _ in range(2):  # with what was known, and with what is found now
                answers += asked_of_everything(one, saes, sweep)
                with contextlib.suppress(MiDiscoverError):
                    one.context.catalog._records.clear()
                    one.context.catalog.refresh()
        finally:
            storage.told.clear()
        assert 503 in {answer.status_code for answer in answers}
        assert 500 not in {answer.status_code for answer in answers}
        for answer in answers:
            for secret in (str(copy), copy.name, "tracker.db", str(Path.home())):
                assert secret not in answer.text, (answer.request.url, answer.text)


def test_saes_that_can_t_be_in_memory_together_are_refused_before_one_is_loaded(store: Path) -> None:
    with served(store) as one:
        sizes = []
        for name in one.saes:
            before = one.interpreter.shelf.bytes
            one.post("/interpret", {"text": "a", "sae": name})
            sizes.append(one.interpreter.shelf.bytes - before)
    with served(store, sae_bytes=sum(sizes[:2]) + 1000) as one:
        refused = one.post("/interpret", {"text": "a", "saes": one.saes[:3]})
        assert refused.status_code == 422
        assert "These 3 SAEs take 0.1 MB together, and sae_bytes allows 0.0; ask fewer" in refused.json()["detail"]
        assert one.interpreter.shelf.loads == 0
        assert one.post("/interpret", {"text": "a", "saes": one.saes[:2]}).status_code == 200
        assert one.interpreter.shelf.loads == 2


def test_a_hook_that_is_not_there_fails_whoever_asked_for_it_and_nobody_beside(store: Path) -> None:
    with served(store) as one:
        inner = one.interpreter
        good, bad = Query(sae=one.saes[0]), Query(kind="values", hook="transformer.h.7.mlp", vector=(1.0,) * 24)
        batches: list[int] = []
        run = inner._batcher._run

        def counted(items: Any) -> Any:
            batches.append(len(items))
            return run(items)

        inner._batcher._run = counted

        async def both() -> list[Any]:
            await inner._saes({one.saes[0]})
            asked = inner.read(["The mill"], [bad], "corpus"), inner.read(["The river"], [good], "corpus")
            return await asyncio.gather(inner.read(["First"], [good], "corpus"), *asked, return_exceptions=True)

        _, wrong, right = asyncio.run(both())
        assert max(batches) == 2, "they were in one batch"
        assert isinstance(wrong, AttributeError)
        assert right[0].tokens == asyncio.run(inner.tokenise("The river", "none")).tokens  # type: ignore[union-attr]
        assert inner._broken is None
