"""Interpreting over a real store, in this process: that it is what the library does, and how much of it is given."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from midiscover.interpret import encode_texts, load_language_model, summarise, tokenised
from midiscover.saes import load_sae
from serve import neuronpedia
from serve.api import InterpretAnswer, reading
from tests.served import Served, api, served, store, store_to_serve

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
__all__ = ["api", "store", "store_to_serve"]  # fixtures

TEXTS = ["The river ran past the old mill.", "Entry 12: stone lamp engine."]


def test_interpreting_is_what_the_library_does(api: Served, store: Path) -> None:
    names = [api.saes[0], api.saes[2]]
    answer = api.post("/interpret", {"texts": TEXTS, "saes": names, "top_k": 5}).json()
    saes = {name: load_sae(name, store=str(store)) for name in names}
    lm = load_language_model(list(saes.values()), str(store))
    for got, text in zip(answer["texts"], encode_texts(lm, saes, TEXTS), strict=True):
        assert got["tokens"] == text.tokens
        for name in names:
            summary, found = summarise(text, name, top=5), got["saes"][name]
            assert [one["feature"] for one in found["features"]] == [one.feature for one in summary.by_max]
            for mine, theirs in zip(found["features"], summary.by_max, strict=True):
                assert mine["values"] == pytest.approx(theirs.values, abs=1e-5)
                assert mine["position"] == theirs.position
                assert mine["mean"] == pytest.approx(theirs.mean, abs=1e-5)
            for mine, theirs in zip(found["per_token"], summary.per_token, strict=True):
                assert [(one["feature"]) for one in mine] == [one.feature for one in theirs]
                assert [one["value"] for one in mine] == pytest.approx([one.value for one in theirs], abs=1e-5)


def test_answers_are_what_the_description_says(api: Served) -> None:
    for body in (
        {"texts": TEXTS, "saes": api.saes[1:3], "top_k": 5},
        {"text": TEXTS[0], "per_token": False},
        {"concept": "numbers", "sae": api.saes[2], "top_k": 3},
    ):
        answer = api.post("/interpret", body)
        assert answer.headers["content-type"] == "application/json"
        assert InterpretAnswer.model_validate_json(answer.content, strict=True).model_dump() == answer.json()


def test_an_answer_holds_so_many_numbers_and_no_more(api: Served, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saes, texts = api.saes[:2], [*TEXTS, "The river"]
    tokens = sum(len(text["tokens"]) for text in api.post("/interpret", {"texts": texts}).json()["texts"])
    body = {"texts": texts, "saes": saes, "top_k": 3}
    exactly = tokens * 3 * 2 * 2
    sae = api.context.catalog.find(saes[0])
    source = {"model": sae.neuronpedia_model, "source": sae.source, "prompts": texts}
    web = {"modelId": sae.neuronpedia_model, "source": sae.source, "customText": texts}
    found = api.post("/v1/activation/source", source).json()["results"]
    fires = [sum(map(len, one["activeFeatures"].values())) for one in found]
    with served(store, limits={"numbers": exactly}) as one:
        assert one.post("/interpret", body).status_code == 200
    with served(store, limits={"numbers": exactly - 1}) as one:
        passes: list[Any] = []
        run = one.interpreter._batcher._run
        monkeypatch.setattr(one.interpreter._batcher, "_run", lambda items: passes.append(items) or run(items))
        refused = one.post("/interpret", body)
        assert refused.status_code == 422
        assert f"would hold {exactly:,} activations, and at most {exactly - 1:,}" in refused.json()["detail"]
        assert passes == [], "it was refused before the pass"
        assert one.post("/interpret", body | {"per_token": False}).status_code == 200
        assert one.post("/interpret", body | {"saes": saes[:1]}).status_code == 200
    for most, status in ((sum(fires), 200), (sum(fires) - 1, 422), (max(fires) - 1, 422)):
        with served(store, limits={"numbers": most}) as one:
            for path, asked in (("/v1/activation/source", source), ("/api/activation/source", web)):
                answer = one.post(path, asked)
                assert answer.status_code == status, answer.text
                assert status == 200 or f"at most {most:,} are given" in answer.json()["error"]


def test_texts_and_answers_are_worked_on_in_other_threads(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a megabyte of either takes as long as many requests: the event loop goes on meanwhile."""
    sae, places, loops = api.context.catalog.find(api.saes[2]), [], set[int]()

    def seen(inner: Any) -> Any:
        def outer(*given: Any, **named: Any) -> Any:
            places.append((getattr(inner, "__name__", ""), threading.get_ident()))
            return inner(*given, **named)

        return outer

    read = type(api.context).read

    async def on_the_loop(*given: Any, **named: Any) -> Any:
        loops.add(threading.get_ident())
        return await read(*given, **named)

    monkeypatch.setattr(type(api.context), "read", on_the_loop)
    monkeypatch.setattr("serve.interpreter.tokenised", seen(tokenised))
    monkeypatch.setattr("serve.api.reading", seen(reading))
    for name in ("_strongest", "_by_token", "_fires"):
        monkeypatch.setattr(f"serve.neuronpedia.{name}", seen(getattr(neuronpedia, name)))
    monkeypatch.setattr(JSONResponse, "render", seen(JSONResponse.render))
    of = {"model": sae.neuronpedia_model, "source": sae.source}
    for path, body in (
        ("/interpret", {"texts": TEXTS}),
        ("/v1/activation/all", {**of, "sourceSet": sae.set, "selectedSources": [sae.source], "prompt": TEXTS[0]}),
        ("/v1/activation/topk-by-token", {**of, "prompt": TEXTS[0]}),
        ("/v1/activation/source", {**of, "prompts": TEXTS}),
        ("/v1/activation/single", {**of, "prompt": TEXTS[0], "index": "3"}),
    ):
        assert api.post(path, body).status_code == 200
    assert {name for name, _ in places} == {"tokenised", "reading", "_strongest", "_by_token", "_fires", "render"}
    assert loops
    assert not loops & {thread for _, thread in places}


def test_the_best_sae_is_asked_where_none_is_named_and_text_once_read_is_not_read_again(api: Served) -> None:
    first = api.post("/interpret", {"text": "A text that nobody has asked before.", "per_token": False}).json()
    (name,) = first["texts"][0]["saes"]
    metrics = {sae["id"]: sae["metrics"]["fvu"] for sae in api.get("/saes").json()["saes"]}
    assert metrics[name] == min(metrics.values())
    assert first["texts"][0]["saes"][name]["per_token"] is None
    batches, hits = api.interpreter.done["batches"], api.interpreter.cache.hits
    assert api.post("/interpret", {"text": "A text that nobody has asked before.", "per_token": False}).json() == first
    assert api.interpreter.cache.hits == hits + 1
    assert api.interpreter.done["batches"] == batches + 1, "it was a batch of the cache's rows"


def test_a_concept_is_ranked(api: Served) -> None:
    answer = api.post("/interpret", {"concept": "numbers", "sae": api.saes[2], "top_k": 3}).json()
    (document,) = answer["concept"].values()
    rows = document["sae_scores"]["features"]
    assert len(rows) == 3
    stored = json.loads(api.context.catalog.storage.read(f"saes/{api.saes[2]}/concepts/numbers.json"))["sae_scores"][
        "features"
    ]
    assert [(row["feature"], row["auroc"]) for row in rows] == [(row["feature"], row["auroc"]) for row in stored[:3]]
    listed = api.get(f"/features/{api.saes[2]}", params={"concept": "numbers", "size": 200}).json()
    assert {row["index"] for row in listed["features"]} == {row["feature"] for row in stored}
