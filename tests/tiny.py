"""Small random language models of six families with a real tokenizer beside them, made in well under a second.

The shapes are odd on purpose (no two widths equal), the weights large enough that every part of a model matters.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

Kind = Literal["phi", "gpt2", "gpt_neox", "llama", "gemma2", "qwen2"]

KINDS: tuple[Kind, ...] = ("phi", "gpt2", "gpt_neox", "llama", "gemma2", "qwen2")

VOCABULARY = 320
"""Ids of the tokenizer; a model has `extra_rows` more embedding rows."""

MLP_OUTPUT: dict[Kind, str] = {
    "phi": "model.layers.{}.mlp.fc2",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "llama": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.mlp.down_proj",
    "qwen2": "model.layers.{}.mlp.down_proj",
}
"""The MLP output projection of a layer, per family."""

# Which token starts a text, and whether the tokenizer puts it there by itself, as in the real families.
_BOS: dict[Kind, tuple[str | None, bool]] = {
    "phi": ("<|endoftext|>", False),
    "gpt2": ("<|endoftext|>", False),
    "gpt_neox": ("<|endoftext|>", False),
    "llama": ("<s>", True),
    "gemma2": ("<bos>", True),
    "qwen2": (None, False),
}

_TEXT = (
    "A sparse autoencoder reads the activations of a language model and writes them as a sum of few features. "
    "In the beginning there was a river, and the people of the valley went down to the water in the morning. "
    "The function returns a list of the items that were found; an empty list means that nothing matched. "
    "She opened the window, looked at the street below and said that it would rain before the evening. "
)


def make_tiny_model(
    kind: Kind,
    folder: Path,
    *,
    extra_rows: int = 12,
    seed: int = 0,
    layers: int = 3,
    d_model: int = 24,
    prepends_bos: bool | None = None,
) -> Path:
    """Save a random model of a family and its tokenizer; returns `folder`. Equal arguments give equal bytes.

    `extra_rows` are embedding rows without a token, as phi-2 has; `prepends_bos` None is what the family does.
    """
    config = _config(kind, layers, d_model, VOCABULARY + extra_rows)
    config.pad_token_id = None
    return _saved(config, folder, _tokenizer(kind, prepends_bos), seed=seed)


def make_tiny_model_of(config: PretrainedConfig, folder: Path) -> Path:
    """The same of any family, with the tokenizer of phi; `config` has VOCABULARY ids or more."""
    return _saved(config, folder, _tokenizer("phi", None))


def _saved(config: PretrainedConfig, folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> Path:
    """Save a random model and a tokenizer; returns `folder`."""
    generator_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    finally:
        torch.set_rng_state(generator_state)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(kind: Kind, layers: int, d_model: int, vocab_size: int) -> PretrainedConfig:
    if kind == "gpt2":
        return transformers.GPT2Config(
            n_layer=layers, n_embd=d_model, n_head=2, n_positions=256, vocab_size=vocab_size, initializer_range=0.2
        )
    shape: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model + 8,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": vocab_size,
        "initializer_range": 0.2,
    }
    if kind == "phi":
        return transformers.PhiConfig(**shape)
    if kind == "gpt_neox":
        return transformers.GPTNeoXConfig(**shape)
    if kind == "llama":
        return transformers.LlamaConfig(**shape, num_key_value_heads=1)
    if kind == "qwen2":
        return transformers.Qwen2Config(**shape, num_key_value_heads=1)
    # Gemma's heads are not d_model / heads wide; its soft-capping needs the eager form.
    return transformers.Gemma2Config(**shape, num_key_value_heads=1, head_dim=16, sliding_window=64)


@functools.cache
def _tokenizer(kind: Kind, prepends_bos: bool | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 ids, trained on four sentences."""
    bos, family_prepends = _BOS[kind]
    eos = bos if bos == "<|endoftext|>" else {"llama": "</s>", "gemma2": "<eos>"}.get(kind, "<|endoftext|>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=list(dict.fromkeys(filter(None, (bos, eos)))),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    if bos and (family_prepends if prepends_bos is None else prepends_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
