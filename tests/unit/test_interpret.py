"""Texts through model and SAEs: the codes are those of a pass by hand, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midiscover.config import ModelConfig
from midiscover.configio import to_tree
from midiscover.errors import ModelError, UserError
from midiscover.interpret import EncodedText, encode_texts, load_language_model, start_token, summarise
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.sae.registry import make_sae
from midiscover.saeconfig import SaeConfig, StandardConfig, TopKConfig, TranscoderConfig
from midiscover.saes import LoadedSae
from tests.tiny import make_tiny_model

FIRST, SECOND, INPUT = "model.layers.0.mlp", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj:in"
WIDTHS = {FIRST: 24, SECOND: 24, INPUT: 56}
TEXTS = ["The river ran.", "A", "In the beginning there was a function that returns a list of rivers.", "rain, rain"]


def sae(hook: str, config: SaeConfig, *, d_out: int | None = None, record: dict[str, Any] | None = None) -> LoadedSae:
    module = make_sae(config, WIDTHS[hook], 48, d_out or WIDTHS[hook])
    module.initialise_(5)
    with torch.no_grad():
        module.b_enc.add_(0.05)
        module.b_dec.add_(torch.linspace(-0.2, 0.2, module.d_out))
    return LoadedSae(module=module.requires_grad_(False), cfg={"metadata": {"hook_name": hook}}, record=record)


@pytest.fixture(scope="module")
def saes() -> dict[str, LoadedSae]:
    return {
        "plain": sae(FIRST, StandardConfig(l1_coefficient=1.0)),
        "topk": sae(SECOND, TopKConfig(k=5)),
        "transcoder": sae(INPUT, TranscoderConfig(l1_coefficient=1.0), d_out=24),
    }


def rows_by_hand(model: LanguageModel, text: str, hook: str, start: Any) -> Tensor:
    """[t, d_in] through a hook of torch's own, without padding."""
    ids: Any = [start, *model.tokenizer(text, add_special_tokens=False).input_ids]
    seen: list[Tensor] = []
    module = model.model.get_submodule(hook.removesuffix(":in"))
    if hook.endswith(":in"):
        handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model.model(torch.tensor([ids]))
    handle.remove()
    return seen[0][0, 1:]


def test_codes_are_those_of_a_pass_by_hand(model: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    start = model.tokenizer.eos_token_id  # the corpora of these SAEs had no BOS
    found = list(encode_texts(model, saes, TEXTS, activations=True))
    assert [text.number for text in found] == [0, 1, 2, 3]
    for text, encoded in zip(TEXTS, found, strict=True):
        assert encoded.token_ids == model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(encoded.tokens) == text
        assert encoded.activations.keys() == WIDTHS.keys()
        x = {hook: rows_by_hand(model, text, hook, start) for hook in WIDTHS}
        for hook, rows in x.items():
            torch.testing.assert_close(encoded.activations[hook], rows, atol=1e-5, rtol=0)
        plain, topk, transcoder = (saes[name].module for name in ("plain", "topk", "transcoder"))
        want = torch.relu((x[FIRST] - plain.b_dec) @ plain.W_enc + plain.b_enc)
        torch.testing.assert_close(encoded.codes["plain"], want, atol=1e-5, rtol=0)
        want = torch.relu(x[INPUT] @ transcoder.W_enc + transcoder.b_enc)
        torch.testing.assert_close(encoded.codes["transcoder"], want, atol=1e-5, rtol=0)
        before = (x[SECOND] - topk.b_dec) @ topk.W_enc + topk.b_enc
        kept = before >= before.topk(5, dim=1).values[:, -1:]
        torch.testing.assert_close(encoded.codes["topk"], torch.relu(before * kept), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_batches_make_no_difference(
    model: LanguageModel, saes: dict[str, LoadedSae], batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [next(encode_texts(model, saes, [text])) for text in TEXTS]
    monkeypatch.setattr("midiscover.interpret.ENCODED_TOKENS", batch_tokens)
    together = list(encode_texts(model, saes, TEXTS, batch_tokens=batch_tokens))
    for one, many in zip(alone, together, strict=True):
        assert one.tokens == many.tokens
        for name in saes:
            torch.testing.assert_close(many.codes[name], one.codes[name], atol=1e-5, rtol=0)
        assert many.activations == {}


def test_one_forward_pass_serves_all_saes(
    model: LanguageModel, saes: dict[str, LoadedSae], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, ...]] = []
    real: Callable[..., Any] = model._forward
    monkeypatch.setattr(model, "_forward", lambda ids, mask: passes.append(tuple(ids.shape)) or real(ids, mask))
    lengths = [len(text.token_ids) for text in encode_texts(model, saes, TEXTS)]
    assert passes == [(4, 1 + max(lengths))]
    passes.clear()
    limit = 2 * (1 + max(lengths[:2]))
    list(encode_texts(model, saes, TEXTS, batch_tokens=limit))
    assert len(passes) == 3
    assert all(rows == 1 or rows * width <= limit for rows, width in passes)


def test_what_is_put_in_front(model: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    assert bos != eos
    assert start_token(model, saes.values()) == eos
    with_bos = sae(FIRST, StandardConfig(l1_coefficient=1.0))
    with_bos.cfg["metadata"]["prepend_bos"] = True
    assert start_token(model, [with_bos]) == bos
    found = next(encode_texts(model, {"it": with_bos}, TEXTS[2:], activations=True))
    torch.testing.assert_close(found.activations[FIRST], rows_by_hand(model, TEXTS[2], FIRST, bos), atol=1e-5, rtol=0)


def test_texts_that_do_not_fit(model: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    with pytest.raises(UserError, match=r"Text 2 of 2, '', holds no token"):
        next(encode_texts(model, saes, ["fine", ""]))
    limit = 256 - 1
    word = model.tokenizer("z", add_special_tokens=False)["input_ids"]
    assert len(word) == 1
    assert len(next(encode_texts(model, {"plain": saes["plain"]}, ["z" * limit])).token_ids) == limit
    with pytest.raises(UserError, match=r"Text 1 of 1, 'z{40}\.\.\.', has 256 tokens, .* at most 255"):
        next(encode_texts(model, saes, ["z" * 256]))
    assert list(encode_texts(model, saes, [])) == []


def test_an_sae_that_does_not_fit(model: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    wrong = LoadedSae(module=saes["transcoder"].module, cfg={"metadata": {"hook_name": FIRST}}, record=None)
    with pytest.raises(UserError, match=r"wrong reads activations of width 56, and 'model.layers.0.mlp' .* has 24"):
        next(encode_texts(model, {"wrong": wrong}, ["a"]))
    with pytest.raises(UserError, match="names no hook"):
        next(encode_texts(model, {"it": LoadedSae(module=saes["plain"].module, cfg={}, record=None)}, ["a"]))


def test_summaries() -> None:
    codes = torch.tensor([[0.0, 3.0, 1.0, 0.0], [2.0, 0.0, 1.0, 0.0], [0.0, 0.5, 2.5, 0.0]])
    text = EncodedText(0, [7, 8, 9], ["a", "b", "c"], {"sae": codes}, {})
    found = summarise(text, "sae", top=3)
    assert found.tokens == ["a", "b", "c"]
    assert found.per_token == [[(1, 3.0), (2, 1.0)], [(0, 2.0), (2, 1.0)], [(2, 2.5), (1, 0.5)]]
    assert [(f.feature, f.max, f.position) for f in found.by_max] == [(1, 3.0, 0), (2, 2.5, 2), (0, 2.0, 1)]
    assert [(f.feature, round(f.mean, 4)) for f in found.by_mean] == [(2, 1.5), (1, 1.1667), (0, 0.6667)]
    assert found.by_max[0].values == [3.0, 0.0, 0.5]
    assert [len(token) for token in summarise(text, "sae", top=1).per_token] == [1, 1, 1]


def record(folder: Path, name: str = "s", **model: Any) -> dict[str, Any]:
    config = ModelConfig(id=str(folder), dtype="float32", **model)
    identity = resolve_model(config)
    return {
        "id": name,
        "hook": FIRST,
        "config": {"model": to_tree(config), "harvest": {"hooks": [FIRST]}},
        "lineage": {
            "model": {"name": identity.name, "digest": identity.digest}
            | ({"weights": config.weights} if config.weights != "trained" else {})
        },
    }


def test_the_model_that_saes_share(tmp_path: Path) -> None:
    one, other = (make_tiny_model("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    config = StandardConfig(l1_coefficient=1.0)
    first, same = (sae(FIRST, config, record=record(one, name)) for name in ("first", "same"))
    lm = load_language_model([first, same], None)
    assert lm.identity.digest == resolve_model(ModelConfig(id=str(one))).digest
    foreign = sae(FIRST, config, record=record(other, "foreign"))
    with pytest.raises(UserError, match=r"different language models: first that of .* and foreign that of"):
        load_language_model([first, foreign], None)
    shuffled = sae(FIRST, config, record=record(one, "shuffled", weights="shuffled"))
    with pytest.raises(UserError, match="with shuffled weights"):
        load_language_model([first, shuffled], None)
    weight = "model.layers.0.mlp.down_proj.weight"
    trained, mixed = (load_language_model([s], None).model.get_parameter(weight) for s in (first, shuffled))
    assert not torch.equal(trained, mixed)
    assert torch.equal(trained.flatten().sort().values, mixed.flatten().sort().values)
    with pytest.raises(ModelError, match="is not the model of first"):
        load_language_model([first], None, model=str(other))
    with pytest.raises(UserError, match="no record"):
        load_language_model([first, sae(FIRST, config)], None)
    with pytest.raises(UserError, match="No SAE is given"):
        load_language_model([], None)
