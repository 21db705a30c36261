"""What a hook is, by its path: the name that TransformerLens has for it, the part of a block that it is in, and whether
it is in the residual stream; and the paths that one text with braces names."""

from __future__ import annotations

import re

from midiscover.ids import hook_block

# The part of a layer whose output a TransformerLens hook also reads, by the names that families use. In parallel blocks
# (Phi, GPT-NeoX) as in serial ones, what an MLP or an attention block adds to the residual stream is the output of its
# last projection.
_MLP_OUT = re.compile(r"mlp(\.(down_proj|fc2|c_proj|dense_4h_to_h|fc_out))?|fc2")
_ATTENTION_OUT = re.compile(
    r"self_attn\.(o_proj|out_proj|dense)|attn\.(c_proj|out_proj|attention\.out_proj)|(self_)?attention\.dense"
)
_LAYER = re.compile(r"(?:model(?:\.decoder)?\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)(?:\.(.+))?")
LAYER_LISTS = ("layers", "layer", "h", "blocks", "block")
"""What families call the list of their layers."""
_NORMALISED_AFTER: dict[str, tuple[str, ...]] = {
    "afmoe": ("post_attention_layernorm", "post_mlp_layernorm"),
    "lfm3": ("post_operator_norm", "post_ffn_norm"),
    **dict.fromkeys(
        ("exaone4", "exaone4_5", "flex_olmo", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text")
        + ("gemma4_unified", "gemma4_unified_text", "olmo2", "olmo3"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    **dict.fromkeys(
        ("glm4", "glm4v", "glm4v_text", "glm_ocr", "glm_ocr_text", "kolibri1"),
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    **dict.fromkeys(("axk1", "beam", "gemma3n", "gemma3n_text", "olmo_hybrid"), ()),
}
"""Families that normalise once more what an attention block or an MLP has made -> the norms that do. Their outputs are
what is added to the residual stream and what TransformerLens' hooks read; the last projections are neither. No norms
are given where layers differ or do more than add."""
_SUM_NORMALISED = frozenset(
    {"bart", "bert", "blenderbot-small", "electra", "marian", "mvp", "openai-gpt", "plbart"}
) | {
    "roberta",
    "xlm-roberta",
}
"""Families that normalise the sum of the residual stream and what is added, so that the norm changes that as well."""
_MLPS = "mlp|ffn|feed_forward|block_sparse_moe"
_ADDED = re.compile(
    rf"({_MLPS}|mlp_block)(\.(down_proj|proj_down|fc2|c_proj|dense_4h_to_h|fc_out|w2|Wo))?|fc2"
    r"|(self_attn|attn|attention|self_attention)(\.(o_proj|out_proj|dense|c_proj|Wo|output|attention\.out_proj))?"
    r"|(mixer|mamba|linear_attn)(\.out_proj)?|temporal_block(\.(linear_out|o_proj))?"
)
"""What all other families whose tokens are named add to the residual stream."""
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
    if side:
        # What attention gives its last projection, there with a dimension of heads.
        return f"blocks.{layer}.attn.hook_z" if _ATTENTION_OUT.fullmatch(part) else None
    if model_type in _NORMALISED_AFTER:
        norms = dict(zip(_NORMALISED_AFTER[model_type], ("attn", "mlp"), strict=False))
        return f"blocks.{layer}.hook_{norms[part]}_out" if part in norms else None
    if _MLP_OUT.fullmatch(part):
        # BLOOM's MLP adds the residual stream itself.
        return None if (part, model_type) == ("mlp", "bloom") else f"blocks.{layer}.hook_mlp_out"
    return f"blocks.{layer}.hook_attn_out" if _ATTENTION_OUT.fullmatch(part) else None


def is_residual(hook: str, model_type: str | None = None) -> bool:
    """Whether directions at a hook are directions of the residual stream, so that the unembedding reads them as they
    are: at a layer, or at what its MLP or its attention adds to it. Not at keys, hidden layers or outputs of any other
    norm, whatever their width.
    """
    part, block = _in_block(hook), hook_block(hook)
    if part is None or block is None or block[0].rpartition(".")[2] not in LAYER_LISTS:
        return False
    if not part:
        return True
    if ":" in hook or model_type in _SUM_NORMALISED:
        return False
    if model_type in _NORMALISED_AFTER:
        return part in _NORMALISED_AFTER[model_type]
    return _ADDED.fullmatch(part) is not None


def block_part(hook: str) -> str | None:
    """The part of a block that a hook is in: `mlp`, `attn`, or `res` for the block itself; None for all else."""
    part = _in_block(hook)
    return next((word for word, paths in _PARTS.items() if part is not None and paths.fullmatch(part)), None)


def _in_block(hook: str) -> str | None:
    """What follows the block in a hook's path, without its side; None outside of blocks."""
    path, block = hook.partition(":")[0], hook_block(hook)
    return None if block is None else path.removeprefix(f"{block[0]}.{block[1]}").removeprefix(".")
