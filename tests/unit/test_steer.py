"""Generated text with features changed, against a loop that runs the whole text anew for each token, hooked by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BambaConfig, MambaConfig, PretrainedConfig, RobertaConfig

from midiscover.config import ModelConfig
from midiscover.cutting import cut_after, holds
from midiscover.errors import UserError
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.saeconfig import StandardConfig, TranscoderConfig
from midiscover.saes import LoadedSae
from midiscover.steer import Change, Sampling, generate
from tests.tiny import make_tiny_model, make_tiny_model_of
from tests.unit.test_interpret import FIRST, INPUT, SECOND, sae

PROMPT = [3, 40, 41, 42, 43]
TOKENS = 12


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("steer") / "model"
    make_tiny_model("llama", folder)
    return LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), dtype="float32")


@pytest.fixture(scope="module")
def saes() -> dict[str, LoadedSae]:
    return {
        "first": sae(FIRST, StandardConfig(l1_coefficient=1.0)),
        "second": sae(SECOND, StandardConfig(l1_coefficient=1.0)),
        "across": sae(
            INPUT,
            TranscoderConfig(l1_coefficient=1.0),
            d_out=24,
            record={"hook": INPUT, "output_hook": SECOND},
        ),
    }


def by_hand(lm: LanguageModel, change: Callable[[Tensor, Tensor], Tensor], hook: str, reads: str) -> list[int]:
    """Greedy, without a cache; `change` gets what `reads` gave and what `hook` gave."""
    ids = list(PROMPT)
    seen: list[Tensor] = []
    module, source = lm.model.get_submodule(hook), lm.model.get_submodule(reads.removesuffix(":in"))
    for _ in range(TOKENS):
        handles = [module.register_forward_hook(lambda _m, _a, out: change(seen[-1], out))]
        if reads.endswith(":in"):
            handles.append(source.register_forward_pre_hook(lambda _m, args: seen.append(args[0])))
        else:
            handles.insert(0, source.register_forward_hook(lambda _m, _a, out: seen.append(out), prepend=True))
        with torch.no_grad():
            token = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
        for handle in handles:
            handle.remove()
        ids.append(token)
        if token == lm.tokenizer.eos_token_id:
            return ids[len(PROMPT) : -1]
    return ids[len(PROMPT) :]


def made(lm: LanguageModel, saes: dict[str, LoadedSae], *changes: Change, **given: Any) -> dict[str, list[int]]:
    return list(generate(lm, PROMPT, saes, changes, Sampling(new_tokens=TOKENS), **given))[-1].token_ids


def test_adding_clamping_and_ablating_are_what_they_say(lm: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    first = saes["first"]
    direction = first.module.W_dec[7]
    plain = by_hand(lm, lambda _x, out: out, FIRST, FIRST)
    cases = {
        "add": (Change("first", 7, "add", 6.0), lambda x, out: out + 6.0 * direction),
        "clamp": (Change("first", 7, "clamp", 9.0), lambda x, out: out + (9.0 - first.encode(x)[..., 7:8]) * direction),
        "ablate": (Change("first", 7, "ablate"), lambda x, out: out - first.encode(x)[..., 7:8] * direction),
    }
    found = {}
    for name, (change, edit) in cases.items():
        both = made(lm, saes, change)
        assert both["default"] == plain, name
        assert both["steered"] == by_hand(lm, edit, FIRST, FIRST), name
        found[name] = both["steered"]
    assert found["add"] != plain
    assert found["clamp"] != plain


def test_changes_at_one_hook_are_made_at_once_and_at_two_one_after_the_other(
    lm: LanguageModel, saes: dict[str, LoadedSae]
) -> None:
    first = saes["first"]
    a, b = first.module.W_dec[7], first.module.W_dec[9]

    def edit(x: Tensor, out: Tensor) -> Tensor:
        return out + 6.0 * a + (4.0 - first.encode(x)[..., 9:10]) * b

    both = made(lm, saes, Change("first", 7, "add", 6.0), Change("first", 9, "clamp", 4.0))
    assert both["steered"] == by_hand(lm, edit, FIRST, FIRST)
    later = made(lm, saes, Change("first", 7, "add", 6.0), Change("second", 3, "add", 5.0))
    assert later["steered"] not in (both["steered"], both["default"])


def test_a_transcoder_reads_before_the_mlp_and_writes_after_it(lm: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    across = saes["across"]
    direction = across.module.W_dec[5]
    both = made(lm, saes, Change("across", 5, "clamp", 8.0))
    expected = by_hand(lm, lambda x, out: out + (8.0 - across.encode(x)[..., 5:6]) * direction, SECOND, INPUT)
    assert both["steered"] == expected


def test_orthogonal_takes_out_what_was_there_in_that_direction(lm: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    direction = saes["first"].module.W_dec[7]

    def edit(_x: Tensor, out: Tensor) -> Tensor:
        unit = direction / direction.norm()
        return out - (out @ unit)[..., None] * unit + 3.0 * direction

    both = made(lm, saes, Change("first", 7, "add", 3.0), orthogonal=True)
    assert both["steered"] == by_hand(lm, edit, FIRST, FIRST)


def test_nothing_is_changed_at_spared_tokens(lm: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    direction = saes["first"].module.W_dec[9]
    spared = {PROMPT[1], PROMPT[-1]}

    def edit(_x: Tensor, out: Tensor) -> Tensor:  # by_hand runs whole sequences, of which the prompt is the beginning
        changed = out + 4.0 * direction
        for place, token in enumerate(PROMPT):
            if token in spared:
                changed[:, place] = out[:, place]
        return changed

    both = made(lm, saes, Change("first", 9, "add", 4.0), spared=spared)
    assert not spared & set(both["steered"]), "what is generated has none of them, so that `edit` is right"
    assert both["steered"] == by_hand(lm, edit, FIRST, FIRST)
    assert both["steered"] != made(lm, saes, Change("first", 9, "add", 4.0))["steered"]


def test_two_sides_of_one_seed_differ_by_the_change_alone(lm: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    warm = Sampling(new_tokens=8, temperature=1.5, seed=11)
    nothing = list(generate(lm, PROMPT, saes, [Change("first", 7, "add", 0.0)], warm))[-1].token_ids
    assert nothing["steered"] == nothing["default"]
    again = list(generate(lm, PROMPT, saes, [Change("first", 7, "add", 9.0)], warm))[-1].token_ids
    assert again["default"] == nothing["default"]
    assert again["steered"] != again["default"]
    other = Sampling(new_tokens=8, temperature=1.5, seed=12)
    assert list(generate(lm, PROMPT, saes, [], other))[-1].token_ids["default"] != nothing["default"]


def test_a_penalised_token_is_not_repeated(lm: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    sampling = Sampling(new_tokens=20, frequency_penalty=1e6)
    tokens = list(generate(lm, PROMPT, saes, [], sampling, sides=("default",)))[-1].token_ids["default"]
    assert len(set(tokens)) == len(tokens) > 5


def test_the_model_is_as_before_and_a_wrong_feature_is_named(lm: LanguageModel, saes: dict[str, LoadedSae]) -> None:
    before = by_hand(lm, lambda _x, out: out, FIRST, FIRST)
    pieces = generate(lm, PROMPT, saes, [Change("first", 7, "add", 50.0)], Sampling(new_tokens=5))
    next(pieces)
    assert by_hand(lm, lambda _x, out: out, FIRST, FIRST) == before, "also while a generation is under way"
    with pytest.raises(UserError, match="first has no feature 48; its features are 0 to 47"):
        next(generate(lm, PROMPT, saes, [Change("first", 48, "add", 1.0)], Sampling()))


@pytest.mark.parametrize(
    ("config", "hook"),
    [
        pytest.param(
            BambaConfig(
                num_hidden_layers=3,
                hidden_size=24,
                intermediate_size=56,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=332,
                attn_layer_indices=[1],
                mamba_n_heads=4,
                mamba_d_head=12,
                mamba_d_state=8,
                mamba_n_groups=1,
                mamba_chunk_size=16,
                initializer_range=0.4,
                pad_token_id=None,
            ),
            "model.layers.1.feed_forward.down_proj",
            id="counts positions anew in a pass that is told none",
        ),
        pytest.param(
            MambaConfig(num_hidden_layers=3, hidden_size=24, state_size=8, vocab_size=332, initializer_range=0.4),
            "backbone.layers.1.mixer.out_proj",
            id="keeps no cache of keys and values",
        ),
    ],
)
def test_other_families_go_on_as_by_hand(config: PretrainedConfig, hook: str, tmp_path: Path) -> None:
    folder = make_tiny_model_of(config, tmp_path / "model")
    lm = LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), dtype="float32", attention="eager")
    own = {"own": sae(SECOND, StandardConfig(l1_coefficient=1.0), record={"hook": hook})}
    direction = own["own"].module.W_dec[7]
    both = made(lm, own, Change("own", 7, "clamp", 9.0))

    def edit(x: Tensor, out: Tensor) -> Tensor:
        return out + (9.0 - own["own"].encode(x)[..., 7:8]) * direction

    assert both["default"] == by_hand(lm, lambda _x, out: out, hook, hook)
    assert both["steered"] == by_hand(lm, edit, hook, hook)
    assert both["steered"] != both["default"]
    assert len(set(both["default"])) > 3, "a repeated token would hide wrong positions"


def test_a_model_that_counts_positions_from_its_padding_does_so_by_itself(tmp_path: Path) -> None:
    """By logits: so small a decoder of this kind repeats one token, whatever the positions."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 56}
    config = RobertaConfig(is_decoder=True, vocab_size=332, initializer_range=0.4, **sizes)
    folder = make_tiny_model_of(config, tmp_path / "model")
    lm = LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), dtype="float32", attention="eager")
    seen: list[Tensor] = []
    real = lm.model.forward

    @functools.wraps(real)
    def forward(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        seen.append(found.logits[0, -1])
        return found

    lm.model.forward = forward
    *_, last = generate(lm, PROMPT, {}, [], Sampling(new_tokens=3), sides=("default",))
    made, passes = last.token_ids["default"], seen[:]
    for count, logits in enumerate(passes):
        with torch.inference_mode():
            whole = real(input_ids=torch.tensor([[*PROMPT, *made[:count]]])).logits[0, -1]
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    assert len(passes) == 3


def test_a_cut_model_gives_the_same_activations_and_says_what_it_lacks(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path / "model")
    whole, cut = (
        LanguageModel.load(resolve_model(ModelConfig(id=str(tmp_path / "model"))), dtype="float32") for _ in range(2)
    )
    ids = torch.tensor([PROMPT])
    hooks = [FIRST, SECOND]
    before = sum(p.numel() for p in cut.model.parameters())
    cut_after(cut, hooks)
    assert sum(p.numel() for p in cut.model.parameters()) < before
    for hook in hooks:
        assert torch.equal(cut.activations(ids, [hook])[hook], whole.activations(ids, [hook])[hook])
    assert holds(cut, hooks)
    assert not holds(cut, ["model.layers.2.mlp"])
    cut_after(whole, ["model.norm", FIRST])
    assert holds(whole, ["model.layers.2.mlp"]), "the norm comes after the last layer"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_changes_of_which_the_model_makes_no_numbers_are_refused(
    lm: LanguageModel, saes: dict[str, LoadedSae], temperature: float
) -> None:
    pieces = generate(lm, PROMPT, saes, [Change("first", 1, "add", 1e39)], Sampling(temperature=temperature))
    with pytest.raises(UserError, match="makes no numbers any more of changes this large; give smaller values"):
        next(pieces)
