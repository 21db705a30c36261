"""Interpreting over a real store, in this process: that it is what the library does, and how much of it is given."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.responses import JSONResponse

from midiscover import steer
from midiscover.features.concepts import Judge
from midiscover.interpret import encode_texts, load_language_model, summarise, tokenised
from midiscover.saes import load_sae
from midiscover.serving import LimitsConfig
from serve import interpreter, neuronpedia
from serve.api import InterpretAnswer, reading
from serve.exchange import Problem
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


def test_saes_are_judged_one_by_one_and_for_nobody_who_is_gone(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[float] = []
    document = Judge.document

    def slow(self: Judge, *args: Any) -> Any:
        judged.append(time.monotonic())
        time.sleep(0.8)
        return document(self, *args)

    with served(store, limits={"seconds": 30.0}) as one:
        body = {"concept": "numbers", "saes": one.saes, "top_k": 3}
        quick = one.post("/interpret", body).json()["concept"]
        monkeypatch.setattr(Judge, "document", slow)
        asking = threading.Thread(target=lambda: answers.append(one.post("/interpret", body)))
        answers: list[Any] = []
        asking.start()
        while not judged:
            time.sleep(0.01)
        assert one.post("/interpret", {"text": "A text that nobody has asked."}).status_code == 200
        assert len(judged) < len(one.saes) == 4, "it came between"
        asking.join()
        found = answers[0].json()["concept"]
        assert {sae: found[sae]["sae_scores"] for sae in found} == {sae: quick[sae]["sae_scores"] for sae in quick}
        judged.clear()
        monkeypatch.setattr(one.client.app, "_limits", LimitsConfig(seconds=2.0))
        assert one.post("/interpret", body).status_code == 503
        time.sleep(3)
        assert 0 < len(judged) < 4


def test_so_many_features_are_judged_at_once(store: Path) -> None:
    with served(store, limits={"judged": 2 * 96}) as one:
        refused = one.post("/interpret", {"concept": "numbers", "saes": one.saes[:3]})
        assert (refused.status_code, refused.json()["detail"]) == (
            422,
            "These 3 SAEs have 288 features, and at most 192 are judged at once; ask fewer.",
        )
        assert one.post("/interpret", {"concept": "numbers", "saes": one.saes[:2]}).status_code == 200
        assert one.interpreter._broken is None
    with served(store, limits={"judged": 95}) as one:
        assert one.post("/interpret", {"concept": "numbers", "saes": one.saes[:1]}).status_code == 200, (
            "one has no less"
        )
        assert one.post("/interpret", {"concept": "numbers", "saes": one.saes[:2]}).status_code == 422


def test_a_concept_is_judged_however_short_texts_must_be(store: Path) -> None:
    with served(store, limits={"tokens": 3}) as one:
        assert one.post("/interpret", {"concept": "numbers", "saes": one.saes[:1]}).status_code == 200
        assert "at most 3 here" in one.post("/interpret", {"text": TEXTS[0]}).json()["detail"]


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")


@pytest.mark.parametrize("by", ["a text", "steering", "a concept", "neighbours"])
def test_memory_that_runs_out_refuses_one_request(
    store: Path, by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("midiscover.serve"), "propagate", True)
    emptied: list[int] = []

    def full(*_: Any, **__: Any) -> Any:
        raise FULL

    with served(store) as one:
        asked = {
            "a text": ("/interpret", {"text": TEXTS[0]}),
            "steering": ("/steer", {"prompt": "The river", "features": [{"feature": 1, "value": 1}]}),
            "a concept": ("/interpret", {"concept": "numbers"}),
        }

        def status() -> tuple[int, str]:
            if by == "neighbours":
                found = asyncio.run(one.interpreter.nearest(one.saes[0], 1, 3))
                return (found.status, found.detail) if isinstance(found, Problem) else (200, "")
            answer = one.post(*asked[by], "steer")
            return answer.status_code, answer.json().get("detail", "")

        with monkeypatch.context() as patched:
            for name in ("midiscover.steer._next", "serve.interpreter.activations_of"):
                patched.setattr(name, full)
            patched.setattr("torch.nn.functional.cosine_similarity", full)
            patched.setattr("torch.cuda.empty_cache", lambda: emptied.append(1))
            assert status() == (503, "There is no memory left for this now; ask for less.")
        one.interpreter.check_health()
        assert emptied == [1]
        assert status()[0] == 200, "the replica goes on"
    # Once each: pytest listens at a logger that did not propagate when the test began, and at the root.
    (logged,) = {id(r): r for r in caplog.records if r.getMessage() == "out_of_memory"}.values()
    assert logged.fields["reason"] == "CUDA out of memory. Tried to allocate 2.00 GiB."  # type: ignore[attr-defined]


def test_texts_that_do_not_fit_together_are_read_one_by_one(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sizes = interpreter.activations_of, list[int]()

    def small(lm: Any, token_ids: Any, *given: Any) -> Any:
        sizes.append(len(token_ids))
        if len(token_ids) > 1:
            raise FULL
        return read(lm, token_ids, *given)

    with served(store, cache_bytes=0) as one:
        whole = one.post("/interpret", {"texts": TEXTS}).json()
        monkeypatch.setattr(interpreter, "activations_of", small)
        answer = one.post("/interpret", {"texts": TEXTS})
        assert (answer.status_code, sizes) == (200, [2, 1, 1])
        one.interpreter.check_health()
    for got, text in zip(answer.json()["texts"], whole["texts"], strict=True):
        ((found, expected),) = ((got["saes"][sae]["features"], text["saes"][sae]["features"]) for sae in text["saes"])
        assert [one["feature"] for one in found] == [one["feature"] for one in expected]


def test_a_failure_without_a_word_is_told_of(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(interpreter, "activations_of", failing)
    with served(store) as one:
        assert one.post("/interpret", {"text": TEXTS[0]}).status_code == 500
        with pytest.raises(RuntimeError, match="The language model failed: RuntimeError"):
            one.interpreter.check_health()


def test_an_sae_that_is_named_twice_is_one(store: Path) -> None:
    with served(store, limits={"saes": 1}) as one:
        sae = one.context.catalog.find(one.saes[0])
        of = {"model": sae.neuronpedia_model, "source": sae.source}
        changes = [{"sae": sae.id, "feature": feature, "value": 1} for feature in (0, 1)]
        assert one.post("/steer", {"prompt": "A", "features": changes, "max_new_tokens": 1}, "steer").status_code == 200
        changes[1]["sae"] = one.saes[1]
        refused = one.post("/steer", {"prompt": "A", "features": changes, "max_new_tokens": 1}, "steer")
        assert (refused.status_code, "2 SAEs are asked; at most 1" in refused.json()["detail"]) == (422, True)
        wire = {"model": of["model"], "types": ["STEERED"], "nCompletionTokens": 1, "temperature": 0, "prompt": "A"}
        wire |= {"strengthMultiplier": 1, "features": [{**of, "index": index, "strength": 1} for index in (0, 1)]}
        assert one.post("/v1/steer/completion", wire, "steer").status_code == 200
        twice = {"model": of["model"], "sourceSet": "x", "selectedSources": [sae.source] * 2, "prompt": "A river"}
        assert one.post("/v1/activation/all", twice).status_code == 200
        assert one.post("/interpret", {"text": "A river", "saes": [sae.id] * 3}).status_code == 200


@pytest.mark.parametrize("by", ["steering", "a stream", "a concept"])
def test_a_model_that_fails_is_told_of_however_it_was_asked(
    store: Path, by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("midiscover.serve"), "propagate", True)
    passes: list[int] = []
    going_on = steer._next

    def failing(*args: Any, **_: Any) -> Any:
        passes.append(1)
        if by != "a stream" or len(passes) > 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")
        return going_on(*args)

    for name in ("midiscover.steer._next", "serve.interpreter.encoded_scores"):
        monkeypatch.setattr(name, failing)
    with served(store) as one:
        one.interpreter.check_health()
        body = {"prompt": "The river", "features": [{"feature": 1, "value": 1}], "stream": by == "a stream"}
        path, asked = ("/interpret", {"concept": "numbers"}) if by == "a concept" else ("/steer", body)
        answer = one.post(path, asked, "steer")
        with pytest.raises(RuntimeError, match="The language model failed: CUDA error: an illegal memory access"):
            one.interpreter.check_health()
    told = "Something went wrong here; the log has it under"
    if by == "a stream":
        frames = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
        assert [frame.get("done") for frame in frames] == [False, False, None]
        assert frames[-1] == {"error": f"{told} the X-Request-Id of this answer.", "status": 500}
    else:
        assert (answer.status_code, told in answer.json()["detail"]) == (500, True)
    logged = {record.getMessage(): record for record in caplog.records}
    assert logged["failed"].fields["request"] == answer.headers["x-request-id"]  # type: ignore[attr-defined]
    assert "model_failed" in logged
