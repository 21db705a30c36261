"""What a model's hooks are like, from its config alone: width and cost of each. Loads no weights."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from midiscover.attach import (
    attach,
    be_quiet,
    context_length,
    embedding_rows,
    require_causal,
    why_not,
)
from midiscover.errors import ModelError
from midiscover.ids import hook_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MLP_NAMES = frozenset({"mlp", "feed_forward", "ffn"})
_ONE_OF_MANY = re.compile(r"\.experts\.\d")
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
    except Exception as error:  # a config that contradicts itself makes a model's code raise anything
        raise ModelError(f"{folder} is no causal language model of transformers: {why_not(error)}") from error
    require_causal(model, str(folder))
    text = config.get_text_config()
    try:
        facts = _dry_run(model.eval())
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        facts = _sizes(model, text.hidden_size)
    return {
        "n_layers": text.num_hidden_layers,
        "d_model": text.hidden_size,
        "vocab_size": embedding_rows(model),
        "context_length": context_length(config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "supports_sdpa": _supports_sdpa(model),
        "hooks": facts.hooks,
        "full": facts.full,
        "recommended": _recommended(model, facts, text.num_hidden_layers, text.hidden_size),
    }


class _Facts(NamedTuple):
    hooks: dict[str, tuple[int, float, float]]
    """Hook -> width, and linear and attention FLOPs before it, in the order in which they fire."""
    full: tuple[float, float]
    """FLOPs of a whole pass."""
    steps: dict[str, int]
    """Hook -> operations before it that sums and copies are left out of: hooks with equal numbers, one after the
    other, are the same activations up to what was added. Empty where no pass tells."""


# Two rows, so that a position table [1, t, d] is not mistaken for activations; a prime number of tokens, so that no
# width of a model equals it.
_ROWS, _TOKENS = 2, 61


_SUMS_AND_COPIES = frozenset({"add", "add_", "view", "_unsafe_view", "clone", "_to_copy", "alias", "detach"})


class _Meter(TorchDispatchMode):
    """Adds up the floating-point operations of all matrix products that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.attention = self.steps = 0
        self.one_expert = False
        """Whether something chose a single one for each token. What an expert gets then has as many rows as there are
        tokens, in another order."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].dtype == torch.bool:
            return True  # a model that asks for numbers asks whether the mask is all ones, and it is
        out = func(*args, **(kwargs or {}))
        self.steps += name not in _SUMS_AND_COPIES
        self.one_expert |= name == "argmax" or (name == "topk" and args[1] == 1)
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


def _dry_run(model: PreTrainedModel) -> _Facts:
    hooks: dict[str, tuple[int, float, float]] = {}
    steps: dict[str, int] = {}
    flat: set[str] = set()
    meter = _Meter()

    def note(hook: str, x: Tensor) -> None:
        if hook in hooks or not x.is_floating_point() or x.shape[:-1] not in ((_ROWS, _TOKENS), (_ROWS * _TOKENS,)):
            return
        hooks[hook] = (x.shape[-1], *meter.per_token())
        steps[hook] = meter.steps
        if x.ndim == 2:
            flat.add(hook)

    ids = torch.zeros(_ROWS, _TOKENS, dtype=torch.long, device="meta")
    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            for hook in (f"{path}:in", path) if path else ():
                stack.callback(attach(module, hook, functools.partial(note, hook)).remove)
        # A mask is given because without one transformers looks at the position ids' values.
        with torch.no_grad(), meter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if meter.one_expert:
        hooks = {hook: facts for hook, facts in hooks.items() if hook not in flat}
    return _Facts(hooks, meter.per_token(), steps)


def _sizes(model: PreTrainedModel, d_model: int) -> _Facts:
    from transformers.pytorch_utils import Conv1D

    hooks: dict[str, tuple[int, float, float]] = {}
    linear = attention = 0.0
    for path, module in model.named_modules():
        if hook_layer(path) is not None and path.endswith(f".{hook_layer(path)}"):
            hooks[f"{path}:in"] = hooks[path] = (d_model, linear, attention)
            attention += 2 * d_model
        elif isinstance(module, (nn.Linear, Conv1D)) and not _ONE_OF_MANY.search(path):
            d_in, d_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            hooks[f"{path}:in"] = (d_in, linear, attention)
            linear += 2 * d_in * d_out
            hooks[path] = (d_out, linear, attention)
    return _Facts(hooks, (linear, attention), {})


def _recommended(model: PreTrainedModel, facts: _Facts, n_layers: int, d_model: int) -> list[str]:
    """The MLP output projections at 1/3, 1/2 and 2/3 of the depth: where SAEs on MLP outputs are usually trained.

    Where a layer's MLP does not end in one projection (it has several experts, or a gate on what it gives), the whole
    MLP; where it has no module of its own, the layer's last projection outside of attention; else the layer.
    """
    from transformers.pytorch_utils import Conv1D

    chosen = []
    for layer in sorted({min(round(n_layers * share), n_layers - 1) for share in (1 / 3, 1 / 2, 2 / 3)}):
        inside = [hook for hook in facts.hooks if hook_layer(hook) == layer and not hook.endswith(":in")]
        wide = [hook for hook in inside if facts.hooks[hook][0] == d_model]
        linear = [hook for hook in wide if isinstance(model.get_submodule(hook), (nn.Linear, Conv1D))]
        in_mlp = [hook for hook in linear if hook.split(".")[-2] in _MLP_NAMES and _ends(hook, facts.steps)]
        whole_mlp = [hook for hook in inside if hook.rpartition(".")[2] in _MLP_NAMES]
        elsewhere = [hook for hook in linear if not (_MLP_NAMES | _ATTENTION_NAMES) & set(hook.split("."))]
        block = [hook for hook in inside if hook.endswith(f".{layer}")]
        chosen += (in_mlp or whole_mlp or elsewhere or block)[-1:]
    return chosen


def _ends(hook: str, steps: Mapping[str, int]) -> bool:
    """Whether what the module around a hook gives is what the hook gives, up to a sum."""
    return steps.get(hook) == steps.get(hook.rpartition(".")[0], steps.get(hook))


def _supports_sdpa(model: Any) -> bool:
    return bool(model._supports_sdpa)  # public only as an error while loading
