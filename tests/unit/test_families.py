"""Models that are built otherwise than most, against a plain transformers model with plain hooks; and those refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3NextConfig

from midiscover.config import ModelConfig
from midiscover.cutting import cut_after
from midiscover.errors import ModelError, UserError
from midiscover.interpret import refuse_too_long
from midiscover.lm import LanguageModel, hook_facts
from midiscover.models import resolve_model
from midiscover.prefix import Prefix
from tests.tiny import make_tiny_model, make_tiny_model_of

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_attention_heads": 2,
    "vocab_size": 332,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
EXPERTS: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
    "decoder_sparse_step": 1,
}
FLAT = {
    "opt": (OPTConfig(**SHAPE, ffn_dim=56, word_embed_proj_dim=24), "model.decoder.layers.1.fc2"),
    "qwen2_moe": (Qwen2MoeConfig(**SHAPE, **EXPERTS), "model.layers.1.mlp.shared_expert.down_proj"),
    "qwen3_next": (
        Qwen3NextConfig(
            **SHAPE,
            **EXPERTS,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
        "model.layers.1.mlp.shared_expert.down_proj",
    ),
}


def load(folder: Path, **given: Any) -> LanguageModel:
    return LanguageModel.load(
        resolve_model(ModelConfig(id=str(folder))), dtype="float32", **{"attention": "eager", **given}
    )


@pytest.mark.parametrize("kind", FLAT)
def test_a_module_that_gets_all_texts_in_one_row_is_read_and_changed_by_text(kind: str, tmp_path: Path) -> None:
    config, hook = FLAT[kind]
    folder = make_tiny_model_of(config, tmp_path / kind)
    facts = hook_facts(folder)
    lm = load(folder)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(3, 320, (3, 11), generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    module = plain.get_submodule(hook)

    def note(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.extend((args[0], output))
        changed = output.clone()
        changed[11:22] = 0  # the second of the three texts
        return changed

    handle = module.register_forward_hook(note)
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False).logits
    handle.remove()
    assert [tuple(x.shape) for x in seen] == [(33, facts["hooks"][f"{hook}:in"][0]), (33, 24)], "flat, by a plain hook"
    found = lm.activations(ids, [f"{hook}:in", hook])
    for part, x in zip(seen, found.values(), strict=True):
        assert torch.equal(x, part.view(3, 11, -1))

    def edit(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 0.0, 1.0])[:, None, None]

    changed = lm.logits(ids, replace={hook: edit})
    assert torch.equal(changed, expected)
    assert not torch.allclose(changed[1], lm.logits(ids)[1], atol=1e-3)
    prefix = Prefix(lm.model, [hook])
    with prefix.kept():
        clean = lm.logits(ids)
    prefix.check(lambda: lm.logits(ids), clean)
    assert prefix.blocks, "what comes before is not run again"
    with prefix.skipped():
        assert torch.equal(lm.logits(ids, replace={hook: edit}), expected)
    cut_after(lm, [hook])
    assert torch.equal(lm.activations(ids, [hook])[hook], found[hook])


@pytest.mark.parametrize("kind", FLAT)
def test_every_hook_of_the_table_gives_the_rows_of_each_text(kind: str, tmp_path: Path) -> None:
    folder = make_tiny_model_of(FLAT[kind][0], tmp_path / kind)
    hooks, lm = hook_facts(folder)["hooks"], load(folder)
    ids = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(2))
    together = lm.activations(ids, hooks)
    assert {hook: x.shape[2] for hook, x in together.items()} == {hook: facts[0] for hook, facts in hooks.items()}
    for row in range(2):
        for hook, x in lm.activations(ids[row : row + 1], hooks).items():
            torch.testing.assert_close(together[hook][row], x[0], rtol=1e-4, atol=1e-4, msg=hook)


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "roberta": SHAPE,
    "megatron-bert": SHAPE,
    "electra": SHAPE | {"embedding_size": 24},
    "rembert": SHAPE | {"input_embedding_size": 24, "output_embedding_size": 24},
    "xlnet": {"n_layer": 2, "d_model": 24, "n_head": 2, "d_inner": 56, "vocab_size": 332},
    "xlm": {"n_layers": 2, "emb_dim": 24, "n_heads": 2, "vocab_size": 332},
    "gemma3_text": SHAPE | {"use_bidirectional_attention": True, "head_dim": 12, "num_key_value_heads": 1},
}


def leaks(folder: Path) -> bool:
    """Whether a token changes what the model says at those before it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.arange(40, 52)[None]
    other = ids.clone()
    other[0, -1] = 7
    with torch.no_grad():
        before, after = (model(input_ids=x).logits[0, :-1] for x in (ids, other))
    return not torch.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_model_whose_tokens_see_later_ones_is_refused(kind: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(kind, **ENCODERS[kind])
    folder = make_tiny_model_of(config, tmp_path / kind)
    assert leaks(folder)
    with pytest.raises(ModelError, match="is no causal language model: its tokens see those after them"):
        hook_facts(folder)
    with pytest.raises(ModelError, match=f"{kind} is no causal language model: its tokens"):
        load(folder)


@pytest.mark.parametrize("kind", ["bert", "gpt_neox", "bart"])
def test_a_decoder_is_taken_whatever_its_config_is_called(kind: str, tmp_path: Path) -> None:
    """BERT with is_decoder; GPT-NeoX, whose config says is_decoder false and means nothing by it; the half of BART."""
    config = transformers.AutoConfig.for_model(kind, **SHAPE)
    if kind == "bert":
        config.is_decoder = True
    if kind == "bart":
        config.d_model, config.decoder_layers, config.decoder_attention_heads = 24, 2, 2
        config.encoder_layers, config.encoder_attention_heads = 2, 2
    assert getattr(config, "is_decoder", None) is (kind == "bert")
    folder = make_tiny_model_of(config, tmp_path / kind)
    assert not leaks(folder)
    assert hook_facts(folder)["hooks"]
    load(folder)


def test_a_config_that_contradicts_itself_is_told(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    message = r"its config\.json is wrong: The hidden size \(24\) is not a multiple"
    with pytest.raises(ModelError, match=message):
        hook_facts(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_a_model_of_foreign_code_is_told_that_none_is_run(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "foreign"}
    classes = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    for use in (hook_facts, load):
        with pytest.raises(ModelError, match="it needs the code that comes with it, and miDiscover runs no such code"):
            use(folder)


def test_the_context_of_mpt_is_known(tmp_path: Path) -> None:
    config: PretrainedConfig = transformers.MptConfig(d_model=24, n_heads=2, n_layers=2, max_seq_len=32, vocab_size=332)
    folder = make_tiny_model_of(config, tmp_path / "mpt")
    assert hook_facts(folder)["context_length"] == 32
    lm = load(folder)
    with pytest.raises(RuntimeError):
        lm.logits(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(UserError, match="has 32 tokens, and mpt reads at most 31 here"):
        refuse_too_long(lm, ["long"], [[5] * 32], front=1)
    for front in (32, 200):  # of which all but one are to be generated
        told = f"mpt reads at most 32 tokens, and {front} are to stand beside the text, so that none of it fits"
        with pytest.raises(UserError, match=f"{told}; ask for fewer new tokens"):
            refuse_too_long(lm, ["a"], [[5]], front=front)
