"""Neuronpedia's interfaces: its own Python client against ours, and what its inference server counts and leaves out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

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
            (place, value) for place, value in enumerate(one.values) if value > 0
        }
        top = SourceActivationRequest().compute_top_features_for_text(model, source, text, num_results=5)
        maxima = {int(i): max(v for _, v in entries) for i, entries in every[0]["activeFeatures"].items()}
        assert [max(row.values) for row in top] == pytest.approx(sorted(maxima.values(), reverse=True)[:5], abs=1e-5)
        both = SourceActivationRequest().compute_top_features_for_texts(model, source, TEXTS, num_results=5)
        assert [row.index for row in both[0]] == [row.index for row in top]
        tokens = TopKByTokenRequest().compute_top_features_by_token_for_text(model, source, text, num_results=3)
        assert [row.token for row in tokens] == one.tokens[1:]
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
    by_token = api.post("/v1/activation/topk-by-token", {**of, "prompt": text, "topK": 2}).json()["results"]
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
