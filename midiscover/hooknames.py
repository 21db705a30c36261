"""What a hook is, by its path: the name that TransformerLens has for it, the part of a block that it is in, and whether
it is in the residual stream; and the paths that one text with braces names."""

from __future__ import annotations

import re

from midiscover.ids import hook_block

# The part of a layer whose output a TransformerLens hook also reads, by the names that families use. In parallel blocks
# (Phi, GPT-NeoX) as in serial ones, what an MLP or an attention block adds to the residual stream is the output of its
# last projection.
_MLP_OUT = re.compile(r"mlp(\.(down_proj|fc2|c_proj|dense_4h_to_h))?")
_ATTENTION_OUT = re.compile(r"(self_attn\.(o_proj|dense)|attn\.c_proj|attention\.dense)")
_LAYER = re.compile(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)(?:\.(.+))?")
_NORMALISED_AFTER = frozenset(
    (
        "afmoe",
        "axk1",
        "beam",
        "exaone4",
        "exaone4_5",
        "flex_olmo",
        "gemma2",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
    )
    + ("gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm4", "glm4v", "glm4v_text")
    + ("glm_ocr", "glm_ocr_text", "kolibri1", "lfm3", "olmo2", "olmo3", "olmo_hybrid")
)
"""Families that normalise once more what an MLP or attention block has made: its last projection is neither one of
TransformerLens' hooks nor what is added to the residual stream."""
_MLPS = "mlp|ffn|feed_forward|block_sparse_moe"
_ADDED = re.compile(
    rf"({_MLPS})(\.(down_proj|fc2|c_proj|dense_4h_to_h|fc_out|w2))?|fc2"
    r"|(self_attn|attn|attention|self_attention)(\.(o_proj|out_proj|dense|c_proj))?"
)
"""The same for all families whose tokens are named."""
_PARTS = {
    "res": re.compile(""),
    "mlp": re.compile(rf"(\w+_)?({_MLPS}|moe)(\..+)?|fc2"),
    "attn": re.compile(r"(\w+_)?(attn|attention)(\..+)?"),
}
"""Word for a part of a block -> what its paths within the block look like. Norms of a part are none of it."""


def expand_braces(text: str) -> list[str]:
    """`model.layers.{8,16}.mlp` as its two paths; several braces multiply."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    options = [option.strip() for option in match[1].split(",")]
    return [path for option in options for path in expand_braces(text[: match.start()] + option + text[match.end() :])]


def transformer_lens_hook(hook: str, model_type: str | None = None) -> str | None:
    """`model.layers.16.mlp.fc2` as `blocks.16.hook_mlp_out`; None where TransformerLens has no such hook.

    model_type: of the model's config.json, as far as it is known.
    """
    path, _, side = hook.partition(":")
    match = _LAYER.fullmatch(path)
    if match is None:
        return None
    layer, part = match[1], match[2]
    if part is None:
        return f"blocks.{layer}.hook_resid_{'pre' if side else 'post'}"
    if side or model_type in _NORMALISED_AFTER:
        return None
    if _MLP_OUT.fullmatch(part):
        # BLOOM's MLP adds the residual stream itself.
        return None if (part, model_type) == ("mlp", "bloom") else f"blocks.{layer}.hook_mlp_out"
    return f"blocks.{layer}.hook_attn_out" if _ATTENTION_OUT.fullmatch(part) else None


def is_residual(hook: str, model_type: str | None = None) -> bool:
    """Whether directions at a hook are directions of the residual stream, so that the unembedding reads them as they
    are: at a layer, or at what its MLP or its attention adds to it. Not at keys, hidden layers or outputs of a norm,
    whatever their width.
    """
    part = _in_block(hook)
    if not part:
        return part is not None
    return ":" not in hook and model_type not in _NORMALISED_AFTER and _ADDED.fullmatch(part) is not None


def block_part(hook: str) -> str | None:
    """The part of a block that a hook is in: `mlp`, `attn`, or `res` for the block itself; None for all else."""
    part = _in_block(hook)
    return next((word for word, paths in _PARTS.items() if part is not None and paths.fullmatch(part)), None)


def _in_block(hook: str) -> str | None:
    """What follows the block in a hook's path, without its side; None outside of blocks."""
    path, block = hook.partition(":")[0], hook_block(hook)
    return None if block is None else path.removeprefix(f"{block[0]}.{block[1]}").removeprefix(".")
