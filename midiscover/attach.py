"""How a module's activations are seen and changed, and what else every use of transformers here begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # takes as long to import as torch, and here it is only named

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


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the token embeddings; may be more than the tokenizer has ids (phi-2: 51,200)."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


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


def first_line(error: Exception) -> str:
    """What an error says, without the lines after the first."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
