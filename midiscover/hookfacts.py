"""What a model's hooks are like, from its config alone: width and cost of each. Loads no weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from midiscover.attach import attach, be_quiet, embedding_rows, first_line
from midiscover.errors import ModelError
from midiscover.ids import hook_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MLP_NAMES = frozenset({"mlp", "feed_forward", "ffn"})
_ATTENTION_NAMES = frozenset({"self_attn", "attn", "attention", "self_attention"})


def hook_facts(folder: Path) -> dict[str, Any]:
    """What `models.hook_table` keeps of a model: its dimensions, and for each hook its width and its cost.

    From the config alone: a forward pass of [2, 61] tokens on the meta device, which computes shapes only. A hook's
    cost is [linear, attention] FLOPs per token of all that ran before it; attention per token of context, causal.
    Where a model's code needs real numbers to run, the modules' own sizes in order of definition stand in.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    be_quiet()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder} is no causal language model of transformers: {first_line(error)}") from error
    text = config.get_text_config()
    try:
        hooks, full = _dry_run(model.eval())
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        hooks, full = _sizes(model, text.hidden_size)
    return {
        "n_layers": text.num_hidden_layers,
        "d_model": text.hidden_size,
        "vocab_size": embedding_rows(model),
        "context_length": getattr(text, "max_position_embeddings", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "supports_sdpa": _supports_sdpa(model),
        "hooks": hooks,
        "full": full,
        "recommended": _recommended(model, hooks, text.num_hidden_layers),
    }


_HookFacts = dict[str, tuple[int, float, float]]
# Two rows, so that a position table [1, t, d] is not mistaken for activations; a prime number of tokens, so that no
# width of a model equals it.
_ROWS, _TOKENS = 2, 61


class _FlopMeter(TorchDispatchMode):
    """Adds up the floating-point operations of all matrix products that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.attention = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "_grouped_mm"):
            self._add(name, *args[:2])
        elif name in ("addmm", "baddbmm"):
            self._add(name, *args[1:3])
        return out

    def _add(self, name: str, left: Tensor, right: Tensor) -> None:
        flops = 2 * left.numel() * right.shape[-1]
        # scores [t, d] x [d, t] and their use [t, t] x [t, d]
        if "bmm" in name and _TOKENS in (right.shape[-1], left.shape[-1]):
            self.attention += flops
        else:
            self.linear += flops

    def per_token(self) -> tuple[float, float]:
        """(linear, attention per token of context); causal attention needs half of the full square."""
        tokens = _ROWS * _TOKENS
        return self.linear / tokens, self.attention / (tokens * _TOKENS * 2)


def _dry_run(model: PreTrainedModel) -> tuple[_HookFacts, tuple[float, float]]:
    hooks: _HookFacts = {}
    meter = _FlopMeter()

    def note(hook: str, x: Tensor) -> None:
        if x.ndim == 3 and x.shape[:2] == (_ROWS, _TOKENS):
            hooks.setdefault(hook, (x.shape[-1], *meter.per_token()))

    ids = torch.zeros(_ROWS, _TOKENS, dtype=torch.long, device="meta")
    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            for hook in (f"{path}:in", path) if path else ():
                stack.callback(attach(module, hook, functools.partial(note, hook)).remove)
        # A mask is given because without one transformers looks at the position ids' values.
        with torch.no_grad(), meter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return hooks, meter.per_token()


def _sizes(model: PreTrainedModel, d_model: int) -> tuple[_HookFacts, tuple[float, float]]:
    from transformers.pytorch_utils import Conv1D

    hooks: _HookFacts = {}
    linear = attention = 0.0
    for path, module in model.named_modules():
        if hook_layer(path) is not None and path.endswith(f".{hook_layer(path)}"):
            hooks[f"{path}:in"] = hooks[path] = (d_model, linear, attention)
            attention += 2 * d_model
        elif isinstance(module, (nn.Linear, Conv1D)):
            d_in, d_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            hooks[f"{path}:in"] = (d_in, linear, attention)
            linear += 2 * d_in * d_out
            hooks[path] = (d_out, linear, attention)
    return hooks, (linear, attention)


def _recommended(model: PreTrainedModel, hooks: Iterable[str], n_layers: int) -> list[str]:
    """The MLP output projections at 1/3, 1/2 and 2/3 of the depth: where SAEs on MLP outputs are usually trained.

    Where a layer's MLP is not one projection after another (several experts), the whole MLP; where it has no module of
    its own, the layer's last projection outside of attention; else the layer.
    """
    from transformers.pytorch_utils import Conv1D

    chosen = []
    for layer in sorted({min(round(n_layers * share), n_layers - 1) for share in (1 / 3, 1 / 2, 2 / 3)}):
        inside = [hook for hook in hooks if hook_layer(hook) == layer and not hook.endswith(":in")]
        linear = [hook for hook in inside if isinstance(model.get_submodule(hook), (nn.Linear, Conv1D))]
        in_mlp = [hook for hook in linear if hook.split(".")[-2] in _MLP_NAMES]
        whole_mlp = [hook for hook in inside if hook.rpartition(".")[2] in _MLP_NAMES]
        elsewhere = [hook for hook in linear if not (_MLP_NAMES | _ATTENTION_NAMES) & set(hook.split("."))]
        block = [hook for hook in inside if hook.endswith(f".{layer}")]
        chosen += (in_mlp or whole_mlp or elsewhere or block)[-1:]
    return chosen


def _supports_sdpa(model: Any) -> bool:
    return bool(model._supports_sdpa)  # public only as an error while loading
