"""What is known of hooks from a config alone: published costs, experts, and which hooks are recommended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    RwkvConfig,
)

from midiscover.hookfacts import hook_facts


def test_flops_of_phi_2_are_the_published_ones(tmp_path: Path) -> None:
    PhiConfig(
        hidden_size=2560, num_hidden_layers=32, intermediate_size=10240, num_attention_heads=32, vocab_size=51200
    ).save_pretrained(tmp_path)
    facts = hook_facts(tmp_path)

    def giga(linear: float, attention: float) -> float:
        return (linear + 512 * attention) / 1e9

    for layer, expected in {8: 1.38, 12: 2.02, 16: 2.66, 20: 3.30, 24: 3.94}.items():
        d_in, *cost = facts["hooks"][f"model.layers.{layer}.mlp.fc2"]
        assert d_in == 2560
        # The anchor leaves out the hooked layer's own attention, which transformers runs before the MLP: 55 MFLOP.
        assert giga(*cost) - 0.055 == pytest.approx(expected, rel=0.005)
    assert giga(*facts["hooks"]["model.layers.24.mlp.fc2"][1:]) == pytest.approx(3.94, rel=0.02)
    assert giga(*facts["full"]) == pytest.approx(5.38, rel=0.005)
    assert facts["recommended"] == [f"model.layers.{layer}.mlp.fc2" for layer in (11, 16, 21)]
    assert facts["parameters"] == pytest.approx(2.78e9, rel=0.01)


def mixtral(per_token: int) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        vocab_size=100,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=per_token,
    )


def test_experts_count_as_often_as_they_run(tmp_path: Path) -> None:
    mixtral(2).save_pretrained(tmp_path)
    facts = hook_facts(tmp_path)
    per_layer = 4 * 32 * 32 + 4 * 32 + 2 * 3 * 32 * 64
    assert facts["full"][0] == 2 * (2 * per_layer + 32 * 100)
    assert facts["recommended"] == ["model.layers.1.mlp"]


@pytest.mark.parametrize(
    ("config", "hook"),
    [
        (OPTConfig(hidden_size=32, ffn_dim=64, word_embed_proj_dim=32), "model.decoder.layers.1.fc2"),
        (DeepseekV3Config(hidden_size=32, first_k_dense_replace=0, n_group=1, topk_group=1), "model.layers.1"),
        (MambaConfig(hidden_size=32), "backbone.layers.1.mixer.out_proj"),
        (RwkvConfig(hidden_size=32, attention_hidden_size=32), "rwkv.blocks.1.feed_forward"),
        (Qwen2MoeConfig(hidden_size=32, num_hidden_layers=2, num_key_value_heads=2), "model.layers.1.mlp"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_is_recommended_where_no_mlp_ends_in_one_projection(
    config: PretrainedConfig, hook: str, tmp_path: Path
) -> None:
    """Never a part of an MLP's output, nor attention, nor what gates it: experts have several; RWKV has a gate last."""
    small = {"num_hidden_layers": 2, "vocab_size": 100, "num_attention_heads": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 64}
    for name, value in (small | experts).items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    assert hook_facts(tmp_path)["recommended"] == [hook]


def test_what_one_expert_gets_is_no_hook(tmp_path: Path) -> None:
    """With one expert for each token it has a row for each of them, but in the order of the experts."""
    mixtral(2).save_pretrained(tmp_path)
    two = hook_facts(tmp_path)["hooks"]
    mixtral(1).save_pretrained(tmp_path)
    one = hook_facts(tmp_path)["hooks"]
    assert {"model.layers.1.mlp.experts:in", "model.layers.1.mlp.experts"} <= two.keys()
    for hooks in (one, two):
        assert not [hook for hook in hooks if ".experts." in hook]
        assert {"model.layers.1.mlp", "model.layers.1.mlp:in"} <= hooks.keys()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "num_experts": 2}),
    ],
)
def test_hybrids_that_ask_for_the_masks_numbers_run_without_any(
    kind: str, given: dict[str, Any], tmp_path: Path
) -> None:
    small = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_state": 8}
    config = AutoConfig.for_model(kind, **small, **heads, **given)
    config.save_pretrained(tmp_path)
    hooks = hook_facts(tmp_path)["hooks"]
    assert {"model.layers.0.input_layernorm", "model.layers.1.feed_forward"} <= hooks.keys(), "more than projections"
    assert "model.layers.0.mamba.dt_proj" not in hooks, "Jamba reads its weight, and never runs it"
