"""Paths of hooks: their names in TransformerLens, and whether they are in the residual stream."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from midiscover.hooknames import _NORMALISED_AFTER, expand_braces, is_residual, transformer_lens_hook
from tests.tiny import make_tiny_model, make_tiny_model_of


@pytest.mark.parametrize(
    ("hook", "family", "name"),
    [
        ("model.layers.16.mlp.fc2", "phi", "blocks.16.hook_mlp_out"),
        ("model.layers.16.mlp", "phi", "blocks.16.hook_mlp_out"),
        ("model.layers.3.self_attn.dense", "phi", "blocks.3.hook_attn_out"),
        ("model.layers.3", "llama", "blocks.3.hook_resid_post"),
        ("model.layers.3:in", "llama", "blocks.3.hook_resid_pre"),
        ("model.layers.3.mlp.down_proj", "llama", "blocks.3.hook_mlp_out"),
        ("model.layers.3.mlp.down_proj", "gemma2", None),
        ("model.layers.3.post_feedforward_layernorm", "gemma2", "blocks.3.hook_mlp_out"),
        ("model.layers.3.post_attention_layernorm", "gemma3_text", "blocks.3.hook_attn_out"),
        ("model.layers.3.post_attention_layernorm", "olmo2", "blocks.3.hook_attn_out"),
        ("model.layers.3.post_attention_layernorm", "llama", None),
        ("model.layers.3.post_feedforward_layernorm:in", "gemma2", None),
        ("model.layers.3.self_attn.o_proj:in", "llama", "blocks.3.attn.hook_z"),
        ("model.layers.3.self_attn.o_proj:in", "gemma2", "blocks.3.attn.hook_z"),
        ("transformer.h.3.attn.c_proj:in", "gpt2", "blocks.3.attn.hook_z"),
        ("model.decoder.layers.3", "opt", "blocks.3.hook_resid_post"),
        ("model.decoder.layers.3.fc2", "opt", "blocks.3.hook_mlp_out"),
        ("model.decoder.layers.3.fc1", "opt", None),
        ("model.decoder.layers.3.self_attn.out_proj", "opt", "blocks.3.hook_attn_out"),
        ("transformer.h.3.attn.out_proj", "gptj", "blocks.3.hook_attn_out"),
        ("transformer.h.3.mlp.fc_out", "gptj", "blocks.3.hook_mlp_out"),
        ("transformer.h.3.attn.attention.out_proj", "gpt_neo", "blocks.3.hook_attn_out"),
        ("transformer.h.3.self_attention.dense", "bloom", "blocks.3.hook_attn_out"),
        ("model.layers.3.mlp:in", "llama", None),
        ("model.layers.3.mlp.up_proj", "llama", None),
        ("transformer.h.0.mlp.c_proj", "gpt2", "blocks.0.hook_mlp_out"),
        ("gpt_neox.layers.2.attention.dense", "gpt_neox", "blocks.2.hook_attn_out"),
        ("model.layers.3.mlp.down_proj", "olmo2", None),
        ("model.layers.3.self_attn.o_proj", "olmo3", None),
        ("model.layers.3", "olmo2", "blocks.3.hook_resid_post"),
        ("transformer.h.3.mlp.dense_4h_to_h", "bloom", "blocks.3.hook_mlp_out"),
        ("transformer.h.3.mlp", "bloom", None),
        ("lm_head", "llama", None),
    ],
)
def test_hooks_of_transformer_lens(hook: str, family: str, name: str | None) -> None:
    assert transformer_lens_hook(hook, family) == name


@pytest.mark.parametrize(
    ("hook", "family", "expected"),
    [
        ("model.layers.1", "phi", True),
        ("model.layers.1:in", "phi", True),
        ("model.layers.1.mlp.fc2", "phi", True),
        ("model.layers.1.self_attn.dense", "phi", True),
        ("model.decoder.layers.1.fc2", "opt", True),
        ("transformer.h.1.attn.out_proj", "gptj", True),
        ("model.language_model.layers.1", "gemma3", True),
        ("model.layers.1.mlp.down_proj", "gemma2", False),
        ("model.layers.1.post_feedforward_layernorm", "gemma2", True),
        ("model.layers.1.post_attention_layernorm", "gemma2", True),
        ("model.layers.1.post_attention_layernorm", "glm4", False),
        ("model.layers.1.post_self_attn_layernorm", "glm4", True),
        ("model.layers.1.post_mlp_layernorm", "glm4", True),
        ("model.layers.1.post_attention_layernorm", "llama", False),
        ("backbone.layers.1.mixer.out_proj", "mamba", True),
        ("backbone.layers.1.mixer.in_proj", "mamba", False),
        ("model.layers.1.mlp_block.down_proj", "recurrent_gemma", True),
        ("backbone.blocks.1.ffn.proj_down", "xlstm", True),
        ("transformer.h.1.attn.attention.out_proj", "gpt_neo", True),
        ("model.altup_projections.1", "gemma3n_text", False),
        ("transformer.h.1.mlp.c_proj", "openai-gpt", False),
        ("transformer.h.1", "openai-gpt", True),
        ("model.layers.1.mlp.fc1:in", "phi", False),
        ("model.layers.1.self_attn.q_proj", "phi", False),
        ("model.layers.1.self_attn.dense:in", "phi", False),
        ("model.layers.1.input_layernorm", "phi", False),
        ("lm_head", "phi", False),
    ],
)
def test_which_hooks_are_in_the_residual_stream(hook: str, family: str, expected: bool) -> None:
    assert is_residual(hook, family) is expected


def test_families_that_normalise_after_an_mlp_are_known() -> None:
    """By their code: a decoder layer of a causal model with a norm of that name is none whose projection is added."""
    folder = Path(transformers.__file__).parent / "models"
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = {
        name
        for name in causal
        for code in folder.glob(f"{name.removesuffix('_text')}/modeling_*.py")
        if re.search(r"self\.post_(feedforward|mlp|ffn)_(layer)?norm\b", code.read_text())
    }
    assert found >= {"gemma2", "olmo2", "glm4"}
    unknown = {name for name in found if is_residual("model.layers.0.mlp.down_proj", name)}
    assert not unknown


def test_what_is_added_is_what_those_norms_give() -> None:
    """By their code: the line before a sum with the residual stream."""
    folder = Path(transformers.__file__).parent / "models"
    for family, norms in _NORMALISED_AFTER.items():
        code = (folder / family.removesuffix("_text") / f"modeling_{family.removesuffix('_text')}.py").read_text()
        for norm in norms:
            pattern = rf"self\.{norm}\(hidden_states\)\n(\s*#.*\n|\s*\n)*\s*hidden_states = residual \+ hidden_states"
            assert re.search(pattern, code), (family, norm)


SMALL = {"vocab_size": 332, "hidden_size": 24}
CONFIGS = {
    "opt": transformers.OPTConfig(**SMALL, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=24),
    "gptj": transformers.GPTJConfig(n_embd=24, n_layer=3, n_head=2, rotary_dim=4, vocab_size=332),
    "gpt_neo": transformers.GPTNeoConfig(
        **SMALL, num_layers=3, num_heads=2, attention_types=[[["global", "local", "global"], 1]]
    ),
    "bloom": transformers.BloomConfig(**SMALL, n_layer=3, n_head=2),
    "olmo2": transformers.Olmo2Config(
        **SMALL, num_hidden_layers=3, num_attention_heads=2, intermediate_size=56, pad_token_id=None
    ),
}


@pytest.mark.parametrize("family", ["phi", "llama", "gpt2", "gpt_neox", "gemma2", *CONFIGS])
def test_what_an_mlp_and_attention_add_is_what_the_next_layer_gets(family: str, tmp_path: Path) -> None:
    """The hooks named so, added to what came in, are what goes out: in serial and in parallel blocks."""
    folder = tmp_path / family
    if family in CONFIGS:
        make_tiny_model_of(CONFIGS[family], folder)
    else:
        make_tiny_model(family, folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, value: object) -> None:
        seen[name] = value[0] if isinstance(value, tuple) else value  # type: ignore[assignment]

    for path, module in model.named_modules():
        if transformer_lens_hook(path, family) is not None:
            module.register_forward_hook(lambda _m, _i, out, path=path: note(path, out))
        if transformer_lens_hook(f"{path}:in", family) is not None:
            module.register_forward_pre_hook(
                lambda _m, args, kwargs, path=path: note(f"{path}:in", args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
    with torch.no_grad():
        model(torch.arange(3, 12)[None])
    by_name: dict[str, list[torch.Tensor]] = {}
    for path, value in seen.items():
        by_name.setdefault(transformer_lens_hook(path, family) or "", []).append(value)
    parts = [by_name[f"blocks.1.hook_{part}"] for part in ("resid_pre", "attn_out", "mlp_out")]
    for same in parts:
        assert all(torch.equal(same[0], other) for other in same[1:])
    added = parts[0][0] + parts[1][0] + parts[2][0]
    torch.testing.assert_close(added, by_name["blocks.1.hook_resid_post"][0])


def test_braces() -> None:
    assert expand_braces("l.{8, 16}.{a,b}") == ["l.8.a", "l.8.b", "l.16.a", "l.16.b"]
    assert expand_braces("plain") == ["plain"]
