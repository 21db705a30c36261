"""How a module's activations are seen and changed, and what else every use of transformers here begins with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from midiscover.errors import ModelError

if TYPE_CHECKING:
    # Takes as long to import as torch, and here it is only named.
    from transformers import PretrainedConfig, PreTrainedModel

Edit = Callable[[Tensor], Tensor | None]
"""What happens at a hook: takes the activations [b, t, d]; returns their replacement, or None to leave them."""


def attach(module: nn.Module, hook: str, edit: Edit) -> torch.utils.hooks.RemovableHandle:
    """Let `edit` see, and perhaps replace, a module's input (`…:in`) or output; of several tensors the first."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                new = edit(value)
                return None if new is None else ((*args[:place], new, *args[place + 1 :]), kwargs)
        value = kwargs.get("hidden_states")
        new = edit(value) if isinstance(value, Tensor) else None
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return edit(output)
        if not isinstance(output, (tuple, list)) or not output or not isinstance(output[0], Tensor):
            return None
        new = edit(output[0])
        return None if new is None else type(output)((new, *output[1:]))

    if hook.endswith(":in"):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def per_text(edit: Edit, shape: Callable[[], tuple[int, ...]]) -> Edit:
    """The same edit for a module that gets all tokens in one row of texts, [b * t, d], as the MLP of OPT does.

    shape: [b, t] of the pass under way.
    """

    def reshaped(x: Tensor) -> Tensor | None:
        b, t = shape()
        if x.ndim != 2 or len(x) != b * t or not x.is_floating_point():
            return edit(x)
        new = edit(x.unflatten(0, (b, t)))
        return None if new is None else new.flatten(0, 1)

    return reshaped


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the token embeddings; may be more than the tokenizer has ids (phi-2: 51,200)."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


def context_length(config: PretrainedConfig) -> int | None:
    """Longest text that a model was made for, in tokens; None where its config does not say."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


_BOTH_WAYS = frozenset({"cpmant", "prophetnet", "xlnet"})
"""Families whose tokens see later ones although transformers counts them among causal language models."""


def require_causal(model: PreTrainedModel, name: str) -> None:
    """ModelError for a model whose tokens see those after them: what it makes of a token is no fact of that token.

    Told by its config and its family's code, so that no weights are needed.
    """
    config: Any = model.config.get_text_config()
    # Encoders such as BERT become decoders by a setting; their code has a mask for both.
    encodes = getattr(config, "is_decoder", None) is False and hasattr(
        sys.modules[type(model).__module__], "create_bidirectional_mask"
    )
    causal = getattr(config, "is_causal", True) and getattr(config, "causal", True)
    both_ways = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if encodes or both_ways or not causal or config.model_type in _BOTH_WAYS:
        raise ModelError(
            f"{name} is no causal language model: its tokens see those after them. Give a model that predicts the next "
            "token, such as GPT-2 or Llama."
        )


def be_quiet() -> None:
    """No advice and no bars of transformers."""
    import transformers  # where it is used, here as elsewhere: it takes seconds, and drivers of jobs load no model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def fuse_gelu(model: nn.Module) -> None:
    """Put PyTorch's own tanh GELU in the place of the one that transformers writes out, the same function.

    Written out it takes eight passes over the widest tensor of the model, a sixth of phi-2's forward pass on a GPU,
    and in bfloat16 rounds after each of them.
    """
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def why_not(error: Exception) -> str:
    """What an error of transformers says of a model that it does not take, in one line."""
    from huggingface_hub.errors import StrictDataclassError

    if "trust_remote_code" in str(error):
        return "it needs the code that comes with it, and miDiscover runs no such code"
    if isinstance(error, StrictDataclassError) and isinstance(error.__cause__, Exception):
        return f"its config.json is wrong: {why_not(error.__cause__)}"
    return str(error).strip().partition("\n")[0] or type(error).__name__
