"""Neuronpedia's interfaces: its own Python client against ours, and what its inference server counts and leaves out."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest
import torch

from midiscover.features.explanations import Explanations
from serve.problems import ProblemError
from tests.served import Served, api, live, store, store_to_serve

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
__all__ = ["api", "store", "store_to_serve"]  # fixtures

TEXTS = ["The river ran past the old mill.", "Entry 12: stone lamp engine."]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_neuronpedias_own_client_needs_only_another_address(api: Served) -> None:
    neuronpedia = pytest.importorskip("neuronpedia")
    from neuronpedia.np_feature import SteerFeature
    from neuronpedia.requests.activation_request import ActivationRequest
    from neuronpedia.requests.base_request import NPRequest
    from neuronpedia.requests.feature_request import FeatureRequest
    from neuronpedia.requests.sae_feature_request import SAEFeatureRequest
    from neuronpedia.requests.source_activation_request import SourceActivationRequest
    from neuronpedia.requests.steer_request import SteerCompletionRequest
    from neuronpedia.requests.topk_by_token_request import TopKByTokenRequest

    sae = api.context.catalog.find(api.saes[2])
    model, source, text = sae.neuronpedia_model, sae.source, TEXTS[0]
    with live(api) as address, neuronpedia.api_key(api.keys["steer"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(NPRequest, "BASE_URL", f"{address}/api")
        found = json.loads(SAEFeatureRequest().get(model, source, "5").jsonData)
        assert found["maxActApprox"] == pytest.approx(api.context.catalog.rows(sae.id)[5]["max"], abs=1e-4)
        feature = FeatureRequest().get(model, source, 5)
        assert feature.density == pytest.approx(api.context.catalog.rows(sae.id)[5]["firing_rate"], abs=1e-7)
        assert feature.activations
        assert feature.explanations[0].text.startswith("peaks at")
        one = ActivationRequest().compute_activation_for_text(model, source, "5", text)
        assert len(one.tokens) == len(one.values)
        many = ActivationRequest().compute_activation_for_texts(model, source, "5", TEXTS)
        assert many[0].values == pytest.approx(one.values, abs=1e-5)
        every = ActivationRequest().compute_all_source_activations_for_text(model, source, TEXTS)
        assert {tuple(entry) for entry in every[0]["activeFeatures"].get("5", [])} == {
            (place, value) for place, value in enumerate(one.values, start=1) if value > 0
        }, "a source counts BOS, a feature leaves it out"
        top = SourceActivationRequest().compute_top_features_for_text(model, source, text, num_results=5)
        maxima = {int(i): max(v for _, v in entries) for i, entries in every[0]["activeFeatures"].items()}
        assert [max(row.values) for row in top] == pytest.approx(sorted(maxima.values(), reverse=True)[:5], abs=1e-5)
        both = SourceActivationRequest().compute_top_features_for_texts(model, source, TEXTS, num_results=5)
        assert [row.index for row in both[0]] == [row.index for row in top]
        tokens = TopKByTokenRequest().compute_top_features_by_token_for_text(model, source, text, num_results=3)
        assert [row.token for row in tokens] == one.tokens
        assert len(TopKByTokenRequest().compute_top_features_by_token_for_texts(model, source, TEXTS)) == 2
        steered: Any = SteerCompletionRequest().steer_features(
            model, [SteerFeature(modelId=model, source=source, index="5", strength=2.0)], text, n_tokens=4
        )
        assert steered["STEERED"].startswith(text)
        with pytest.raises(Exception, match="not found"):
            SAEFeatureRequest().get(model, "99-nothing", "5")


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
TURNS = [{"role": "user", "content": "The river ran"}]


@pytest.fixture
def with_template(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.interpreter.lm.tokenizer, "chat_template", TEMPLATE)


def chat(api: Served, **given: Any) -> Any:
    sae = api.context.catalog.find(api.saes[2])
    feature = {"model": sae.neuronpedia_model, "source": sae.source, "index": 5, "strength": 9.0}
    settings = {"nCompletionTokens": 6, "temperature": 0.0, "strengthMultiplier": 1.0, "types": ["STEERED", "DEFAULT"]}
    body = {"model": sae.neuronpedia_model, "prompt": TURNS, "features": [feature], **settings, **given}
    return api.post("/v1/steer/completion-chat", body, "steer")


def test_a_model_without_a_chat_template_is_asked_no_conversations(api: Served) -> None:
    refused = chat(api)
    assert refused.status_code == 422
    assert "no chat template" in refused.json()["error"]


@pytest.mark.usefixtures("with_template")
def test_a_chat_is_steered_as_the_text_that_its_template_makes(api: Served) -> None:
    answer = chat(api).json()
    raw = "<s>user: The river ran <s>"
    assert answer["input"] == {"chatTemplate": TURNS, "raw": raw}
    steered, plain = answer["outputs"]
    assert [steered["type"], plain["type"]] == ["STEERED", "DEFAULT"]
    completed = api.post(
        "/steer",
        {
            "prompt": raw.removeprefix("<s>"),
            "features": [{"sae": api.saes[2], "feature": 5, "value": 9.0}],
            "max_new_tokens": 6,
        },
        "steer",
    ).json()
    for one, side in ((steered, "steered"), (plain, "default")):
        assert one["raw"] == raw + completed[side]
        assert one["chatTemplate"] == [*TURNS, {"role": "assistant", "content": completed[side]}]
    assert steered["raw"] != plain["raw"]
    spared = chat(api, steerSpecialTokens=False).json()["outputs"]
    assert spared[1] == plain
    assert spared[0] != steered, "the answer begins at a special token, where nothing was changed"
    assert chat(api, prompt=[{"role": "user"}]).status_code == 422


@pytest.mark.usefixtures("with_template")
def test_a_streamed_chat_grows_to_the_whole_answer(api: Served) -> None:
    streamed = chat(api, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    frames = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if line]
    assert len(frames) > 2
    assert frames[-1] == chat(api).json()
    for before, after in zip(frames, frames[1:], strict=False):
        for one, next_one in zip(before["outputs"], after["outputs"], strict=True):
            assert next_one["raw"].startswith(one["raw"]), "each frame holds the whole text so far"


@pytest.mark.usefixtures("with_template")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_neuronpedias_own_client_steers_a_chat(api: Served) -> None:
    neuronpedia = pytest.importorskip("neuronpedia")
    from neuronpedia.np_feature import SteerFeature
    from neuronpedia.requests.base_request import NPRequest
    from neuronpedia.requests.steer_request import SteerChatRequest

    sae = api.context.catalog.find(api.saes[2])
    feature = SteerFeature(modelId=sae.neuronpedia_model, source=sae.source, index="5", strength=9.0)
    other = [*TURNS, {"role": "assistant", "content": "far"}, {"role": "user", "content": "And then?"}]
    with live(api) as address, neuronpedia.api_key(api.keys["steer"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(NPRequest, "BASE_URL", f"{address}/api")
        found: Any = SteerChatRequest().steer_features(
            sae.neuronpedia_model, [feature], other, TURNS, temperature=0.0, n_tokens=6, freq_penalty=0.0,
            strength_multiplier=1.0,
        )  # fmt: skip
    steered, plain = chat(api).json()["outputs"][0], found["DEFAULT"]
    assert found["STEERED"] == {"raw": steered["raw"], "chatTemplate": steered["chatTemplate"]}
    assert plain["chatTemplate"][:-1] == other
    assert plain["raw"].startswith("<s>user: The river ran <s>assistant: far <s>user: And then? <s>")


def test_the_inference_routes_count_and_leave_out_bos_as_neuronpedia_does(api: Served) -> None:
    sae = api.context.catalog.find(api.saes[2])
    of = {"model": sae.neuronpedia_model, "source": sae.source}
    text = TEXTS[0]
    values = [
        api.post("/v1/activation/single", {**of, "prompt": text, "index": str(index)}).json()["activation"]["values"]
        for index in range(96)
    ]
    tokens = api.post("/v1/tokenize", {"model": of["model"], "text": text}).json()
    assert tokens["tokenStrings"][0] == "<s>"
    assert len(values[0]) == len(tokens["tokens"]) - 1, "BOS is dropped"
    everything = api.post(
        "/v1/activation/all", {"model": of["model"], "sourceSet": sae.set, "selectedSources": [sae.source],
                               "prompt": text, "numResults": 4, "ignoreBos": True}
    ).json()  # fmt: skip
    order = sorted(range(96), key=lambda i: (-max(values[i]), i))[:4]
    assert [row["index"] for row in everything["activations"]] == order
    assert everything["activations"][0]["values"][0] == 0, "BOS counts as 0 and keeps its place"
    assert everything["activations"][0]["values"][1:] == pytest.approx(values[order[0]], abs=1e-6)
    at = api.post(
        "/v1/activation/all", {"model": of["model"], "source_set": sae.set, "selected_sources": [sae.source],
                               "prompt": text, "num_results": 3, "sort_by_token_indexes": [2, 4]}
    ).json()  # fmt: skip
    sums = {i: values[i][1] + values[i][3] for i in range(96)}
    assert [row["index"] for row in at["activations"]] == sorted(sums, key=lambda i: (-sums[i], i))[:3]
    without = api.post("/v1/activation/topk-by-token", {**of, "prompt": text, "topK": 2}).json()
    by_token = without["results"]
    assert without["tokens"] == tokens["tokenStrings"][1:]
    whole = api.post("/v1/activation/topk-by-token", {**of, "prompt": text, "topK": 2, "ignoreBos": False}).json()
    assert (whole["tokens"], whole["results"][1:]) == (tokens["tokenStrings"], by_token)
    assert [row["tokenPosition"] for row in by_token] == list(range(1, len(tokens["tokens"])))
    for row in by_token:
        here = [value[row["tokenPosition"] - 1] for value in values]
        best = [i for i in sorted(range(96), key=lambda i: -here[i])[:2] if here[i] > 0]
        assert [one["featureIndex"] for one in row["topFeatures"]] == best
    vector = api.post("/v1/util/sae-vector", {**of, "index": 7}).json()
    module = api.interpreter.shelf.get(sae.id).module
    assert vector == {"vector": pytest.approx(module.W_enc[:, 7].tolist()), "hookName": sae.record["hook"]}
    near = api.post(
        "/v1/util/sae-topk-by-decoder-cossim", {**of, "feature": {**of, "index": 7}, "numResults": 3}
    ).json()
    cosines = torch.nn.functional.cosine_similarity(module.W_dec, module.W_dec[7][None], dim=1)
    expected = [i for i in cosines.argsort(descending=True).tolist() if i != 7][:3]
    assert [row["feature"]["index"] for row in near["topkDecoderCossimFeatures"]] == expected
    bad = api.post("/v1/activation/single", {**of, "prompt": text, "index": 5})
    assert bad.status_code == 422, "a numeric index is refused there as well"
    assert "error" in bad.json()
    direction = api.post(
        "/v1/activation/single",
        {"model": of["model"], "prompt": text, "vector": [1.0] * 24, "hook": sae.record["hook"]},
    )
    assert direction.status_code == 200
    again = api.post("/v1/activation/single-batch", {**of, "prompts": TEXTS, "index": "5"}).json()["results"]
    assert again[0]["activation"]["values"] == pytest.approx(values[5], abs=1e-5)


def test_bos_within_a_text_counts_as_0_and_a_special_beginning_may_be_left_out(api: Served) -> None:
    sae = api.context.catalog.find(api.saes[2])
    of = {"model": sae.neuronpedia_model, "source": sae.source}
    text = "<s><s>The river <s> ran"
    ids = api.post("/v1/tokenize", {"model": of["model"], "text": text}).json()
    places = [place for place, token in enumerate(ids["tokens"]) if token == ids["tokens"][0]]
    assert len(places) == 3
    assert places[:2] == [0, 1]
    every = api.post("/v1/activation/source", {**of, "prompts": [text]}).json()["results"][0]["activeFeatures"]
    index = next(name for name, entries in every.items() if places[2] in dict(entries))
    single = api.post("/v1/activation/single", {**of, "prompt": text, "index": index}).json()
    values = [dict(every[index]).get(place, 0.0) for place in range(1, len(ids["tokens"]))]
    assert values[places[2] - 1] > 0, "it would fire there"
    expected = [0.0 if place in places else value for place, value in enumerate(values, start=1)]
    assert single["activation"]["values"] == pytest.approx(expected, abs=1e-6)
    assert single["tokens"] == ids["tokenStrings"][1:]
    feature = {"feature": {"modelId": of["model"], "source": of["source"], "index": index}, "customText": text}
    new = api.post("/api/activation/new", feature).json()
    assert (new["tokens"], new["values"]) == (single["tokens"], single["activation"]["values"])
    shorter = api.post("/api/activation/new", feature | {"ignoreBos": True}).json()
    assert (shorter["tokens"], shorter["values"]) == (new["tokens"][1:], new["values"][1:])


def test_nothing_is_left_out_where_the_tokenizer_has_no_bos(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = api.context.catalog.find(api.saes[2])
    of, text = {"model": sae.neuronpedia_model, "source": sae.source}, "The river ran to The river"
    monkeypatch.setattr(type(api.interpreter), "_bos", lambda _self: None)
    ids = api.post("/v1/tokenize", {"model": of["model"], "text": text}).json()["tokens"]
    assert ids == api.interpreter.lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    every = api.post("/v1/activation/source", {**of, "prompts": [text]}).json()["results"][0]["activeFeatures"]
    index, entries = next((name, dict(entries)) for name, entries in every.items() if 0 in dict(entries))
    single = api.post("/v1/activation/single", {**of, "prompt": text, "index": index}).json()
    assert single["activation"]["values"] == pytest.approx([entries.get(place, 0.0) for place in range(len(ids))])
    tokens = api.post("/v1/activation/topk-by-token", {**of, "prompt": text}).json()["results"]
    assert [row["tokenPosition"] for row in tokens] == list(range(len(ids)))
    new = {"feature": {"modelId": of["model"], "source": of["source"], "index": index}, "customText": text}
    assert api.post("/api/activation/new", new).json()["values"] == single["activation"]["values"]


def test_features_that_fire_too_often_are_left_out_where_it_is_known_how_often(api: Served) -> None:
    sae = api.context.catalog.find(api.saes[2])
    rates = [row["firing_rate"] for row in api.context.catalog.rows(sae.id)]
    by_token = {"modelId": sae.neuronpedia_model, "source": sae.source, "text": TEXTS[0], "numResults": 5}
    over_all = {"modelId": sae.neuronpedia_model, "sourceSet": sae.set, "selectedLayers": [sae.source],
                "text": TEXTS[0], "numResults": 5}  # fmt: skip

    def of_tokens(threshold: float) -> list[list[int]]:
        answer = api.post("/api/search-topk-by-token", by_token | {"densityThreshold": threshold}).json()
        return [[one["featureIndex"] for one in row["topFeatures"]] for row in answer["results"]]

    def of_text(threshold: float) -> list[int]:
        answer = api.post("/api/search-all", over_all | {"densityThreshold": threshold}).json()
        return [int(row["index"]) for row in answer["result"]]

    every = of_tokens(-1)
    assert of_tokens(0) == every
    assert of_text(0) == of_text(-1)
    assert len(of_text(0)) == 5
    bound = sorted(rates[feature] for row in every for feature in row)[2]
    assert 0 < bound < 1
    rare = of_tokens(bound)
    for row, all_of_it in zip(rare, every, strict=True):
        assert all(rates[feature] <= bound for feature in row)
        assert [one for one in all_of_it if rates[one] <= bound] == row[: sum(rates[o] <= bound for o in all_of_it)]
    assert rare != every
    assert all(rates[feature] <= bound for feature in of_text(bound))
    default = api.post("/api/search-topk-by-token", by_token).json()
    assert of_tokens(0.01) == [[one["featureIndex"] for one in row["topFeatures"]] for row in default["results"]]


def test_the_web_routes_stream_and_take_any_seed(api: Served) -> None:
    sae = api.context.catalog.find(api.saes[2])
    feature = {"modelId": sae.neuronpedia_model, "layer": sae.source, "index": 5, "strength": 9.0}
    body = {"modelId": sae.neuronpedia_model, "prompt": "The river", "features": [feature], "n_tokens": 6}
    whole = api.post("/api/steer", body, "steer")
    streamed = api.post("/api/steer", body | {"stream": True}, "steer")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    frames = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if line]
    assert len(frames) > 2
    assert frames[-1] == whole.json()
    for before, after in zip(frames, frames[1:], strict=False):
        assert after["STEERED"].startswith(before["STEERED"])
        assert before["STEERED"].startswith("The river")
    negative = api.post("/api/steer", body | {"seed": -5}, "steer").json()
    assert negative == api.post("/api/steer", body | {"seed": 2**63 - 5}, "steer").json()
    assert negative != api.post("/api/steer", body | {"seed": 5}, "steer").json()


def test_a_direction_is_read_at_hooks_of_its_own_model_alone(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = api.context.catalog
    sae = catalog.find(api.saes[2])
    record = json.loads(json.dumps(sae.record)) | {"hook": "transformer.h.7.mlp"}
    record["lineage"]["model"] |= {"name": "other", "digest": "other"}
    monkeypatch.setitem(catalog._hosted, "zz", dataclasses.replace(sae, id="zz", record=record))
    body = {"model": sae.neuronpedia_model, "prompt": "The river", "vector": [1.0] * 24}
    refused = api.post("/v1/activation/single", body | {"hook": "transformer.h.7.mlp"})
    assert refused.status_code == 404
    assert f"No SAE of '{sae.neuronpedia_model}' here reads the hook" in refused.json()["error"]
    assert api.post("/v1/activation/single", body | {"hook": sae.record["hook"]}).status_code == 200


@pytest.mark.parametrize("family", ["llama", "gemma2", None])
def test_a_hook_has_the_name_of_the_export(api: Served, monkeypatch: pytest.MonkeyPatch, family: str | None) -> None:
    sae = api.context.catalog.find(api.saes[2])
    facts = api.interpreter.facts
    assert asyncio.run(facts())["model_type"] == "llama"

    async def told() -> dict[str, Any]:
        if family is None:
            raise ProblemError(503, "busy")
        return {**await facts(), "model_type": family}

    monkeypatch.setattr(api.interpreter, "facts", told)
    api.context.model_types.clear()
    feature = api.get(f"/api/feature/{sae.neuronpedia_model}/{sae.source}/5").json()
    expected = f"blocks.{sae.record['layer']}.hook_mlp_out" if family == "llama" else sae.record["output_hook"]
    assert (feature["hookName"], feature["source"]["hookName"]) == (expected, expected)
    assert api.context.model_types == ({sae.model: family} if family else {}), "it is asked again while nobody knows"
    api.context.model_types.clear()


def test_what_a_model_said_of_a_feature_is_told_with_its_scores(api: Served) -> None:
    neuronpedia = pytest.importorskip("neuronpedia")
    from neuronpedia.requests.base_request import NPRequest
    from neuronpedia.requests.feature_request import FeatureRequest

    catalog = api.context.catalog
    sae = catalog.find(api.saes[2])
    said = Explanations(catalog.storage, sae.id, catalog.features(sae.id).features_id, "some-model", {})
    said.add({5: {"text": "Words <b>about</b> rain", "made": "2026", "detection": {"score": 0.75}, "fuzz": None}})
    catalog._features.clear()
    try:
        told = api.get(f"/saes/{sae.id}/features/5").json()
        assert (told["label"], told["explained"]["detection"]) == ("Words <b>about</b> rain", 0.75)
        found = api.get(f"/features/{sae.id}", params={"text": "ABOUT</b> rain"}).json()
        assert [(row["index"], row["label"]) for row in found["features"]] == [(5, "Words <b>about</b> rain")]
        (row,) = api.get(f"/api/feature/{sae.neuronpedia_model}/{sae.source}/5").json()["explanations"]
        assert [(s["explanationScoreTypeName"], s["value"]) for s in row["scores"]] == [("eleuther_recall", 0.75)]
        with live(api) as address, neuronpedia.api_key(api.keys["read"]), pytest.MonkeyPatch.context() as patch:
            patch.setattr(NPRequest, "BASE_URL", f"{address}/api")
            feature = FeatureRequest().get(sae.neuronpedia_model, sae.source, 5)
        assert feature.explanations[0].text == "Words <b>about</b> rain"
    finally:
        catalog.storage.delete(said.key(0))
        catalog._features.clear()


def test_explanations_are_found_once_each_by_their_words(api: Served) -> None:
    sae = api.context.catalog.find(api.saes[2])
    body = {"modelId": sae.neuronpedia_model, "layers": [sae.source], "query": "  PEAKS   at "}
    once = api.post("/api/explanation/search", body).json()
    assert once["resultsCount"] == 20
    assert once["hasMore"]
    again = api.post("/api/explanation/search", body | {"layers": [sae.source, sae.id, sae.source]}).json()
    assert {**again, "request": 0} == {**once, "request": 0}
    last = api.post("/api/explanation/search", body | {"layers": [sae.source] * 2, "offset": 90}).json()
    assert not last["hasMore"]
    blank = api.post("/api/explanation/search", body | {"query": "    "})
    assert (blank.status_code, blank.json()["error"]) == (422, "The query holds no word.")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/activation/new", '{"feature": {"modelId": "M", "source": "S", "index": "\u00b2"}, "customText": "a"}'),
        ("/api/activation/new", '{"feature": {"modelId": "M", "source": "S", "index": "\u0663"}, "customText": "a"}'),
        ("/v1/activation/single", '{"model": "M", "source": "S", "index": "\u0663", "prompt": "a"}'),
        ("/v1/activation/single", '{"model": "M", "hook": "H", "vector": [NaN], "prompt": "a"}'),
        ("/v1/activation/single", '{"model": "M", "hook": "H", "vector": [1e39], "prompt": "a"}'),
        ("/v1/activation/single", '{"model": "M", "hook": "H", "vector": [], "prompt": "a"}'),
        ("/v1/util/sae-topk-by-decoder-cossim", '{"model": "M", "source": "S", "vector": [1e39]}'),
        ("/v1/util/sae-topk-by-decoder-cossim", '{"model": "M", "source": "S", "vector": [Infinity]}'),
    ],
)
def test_numbers_that_are_none_are_refused(api: Served, path: str, body: str) -> None:
    sae = api.context.catalog.find(api.saes[2])
    for short, name in (("M", sae.neuronpedia_model), ("S", sae.source), ("H", sae.record["hook"])):
        body = body.replace(f'"{short}"', json.dumps(name))
    for vector in ("NaN", "1e39", "Infinity"):
        body = body.replace(f"[{vector}]", f"[{', '.join([vector] * 24)}]")
    answer = api.client.post(path, content=body, headers={**api.headers(), "Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_temperature_next_to_0_takes_the_likeliest(api: Served) -> None:
    body = {"prompt": "The river", "features": [{"feature": 3, "value": 6.0}], "max_new_tokens": 6, "seed": 5}
    likeliest = api.post("/steer", body, "steer").json()
    for temperature in (1e-40, 1e-310, 5e-324):
        assert api.post("/steer", body | {"temperature": temperature}, "steer").json() == likeliest
