"""A language model that is read at hooks: load, activations of many hooks in one pass, logits with parts replaced.

A hook is a module path as in `model.named_modules()`, read at its output (`model.layers.16.mlp.fc2`) or, with `:in`, at
its input. Also run by `models.py` as a process of its own, so that its caller loads no torch:

    python -m midiscover.lm table FOLDER              the hook table of a model folder, from its config alone, as JSON
    python -m midiscover.lm convert GGUF FOLDER ABOUT a GGUF file to a safetensors folder

Which model is meant, and where its files are, is `models.py`'s matter; windows and batches are the caller's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from midiscover.config import Dtype
from midiscover.errors import ModelError
from midiscover.ids import hook_layer
from midiscover.modelfiles import NAME_FILE
from midiscover.models import ModelIdentity, config_folder, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # takes as long to import as torch, and here it is only named

Edit = Callable[[Tensor], Tensor | None]
"""What happens at a hook: takes the activations [b, t, d]; returns their replacement, or None to leave them."""

_MLP_NAMES = frozenset({"mlp", "feed_forward", "ffn"})


class LanguageModel:
    """A causal language model in evaluation mode, on one device, or spread over several, `device` being the first.

    >>> lm = LanguageModel.load(resolve_model(ModelConfig(id="embedded")), dtype="bfloat16")
    >>> acts = lm.activations(ids, ["model.layers.15.mlp.down_proj"])  # ids [b, t] -> {hook: [b, t, d_in]}
    >>> logits = lm.logits(ids, replace={"model.layers.15.mlp.down_proj": torch.zeros_like})
    """

    def __init__(self, identity: ModelIdentity, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.identity = identity
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = model.device
        self.vocab_size = _embedding_rows(model)
        """Embedding rows; may be more than the tokenizer has ids (phi-2: 51,200)."""

    @classmethod
    def load(
        cls, identity: ModelIdentity, *, dtype: Dtype, attention: str = "sdpa", device: str | torch.device = "cpu",
        device_map: str | dict[str, str] | None = None,
    ) -> LanguageModel:  # fmt: skip
        """Load the weights and the tokenizer; a hub model is downloaded once per machine. Raises ModelError.

        device_map: how the layers are spread over devices instead, as accelerate takes it: `balanced`, over all GPUs.
        """
        _be_quiet()
        folder = model_folder(identity)
        device = torch.device(device)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=compute_dtype(dtype, device),
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                device_map=device_map,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"Model {identity.name} could not be loaded from {folder}: {_first_line(error)}"
            ) from error
        model, report = loaded
        # transformers only warns and goes on with random numbers.
        absent = sorted({*report["missing_keys"], *report["mismatched_keys"]}, key=str)
        if absent:
            raise ModelError(
                f"The weights of {identity.name} lack or do not fit {absent[0]}; the folder is incomplete."
            )
        return cls(identity, model if device_map else model.to(device), load_tokenizer(identity))

    @torch.inference_mode()
    def activations(self, ids: Tensor, hooks: Iterable[str], attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Activations of several hooks from one forward pass that ends as soon as the last of them has fired.

        `ids` [b, t] and `attention_mask` [b, t] (1: a token, 0: padding on the right) on any device; a mask of None,
        where nothing is padded, is faster. Returns {hook: [b, t, d_in]} in the model's dtype, on its device.
        ModelError: a hook that this model does not have, that never runs, or whose tensor is not [b, t, d_in].
        """
        wanted = tuple(dict.fromkeys(hooks))
        found: dict[str, Tensor] = {}

        def keep(hook: str, x: Tensor) -> None:
            # A copy: modules may change their result in place later, or return a slice of something much larger.
            found.setdefault(hook, x.clone().to(self.device))
            if len(found) == len(wanted):
                raise _AllFired

        edits = {hook: functools.partial(keep, hook) for hook in wanted}
        if wanted:
            with contextlib.suppress(_AllFired), self._hooked(edits):
                self._forward(ids, attention_mask)
        for hook in wanted:
            if hook not in found:
                raise ModelError(f"Hook {hook!r} of {self.identity.name} is not part of a forward pass.")
            if found[hook].shape[:2] != ids.shape or found[hook].ndim != 3:
                raise ModelError(
                    f"Hook {hook!r} of {self.identity.name} gives {list(found[hook].shape)}, not [batch, tokens, d_in]."
                )
        return {hook: found[hook] for hook in wanted}

    @torch.inference_mode()
    def logits(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        replace: Mapping[str, Callable[[Tensor], Tensor]] = {},
    ) -> Tensor:
        """Logits [b, t, vocab_size] of a whole pass in which each hook of `replace` passes through its function.

        A function takes the activations [b, t, d_in] and returns as many; the model's dtype is restored after it.
        """

        def same_kind(hook: str, x: Tensor) -> Tensor:
            new = replace[hook](x.to(self.device))
            if new.shape != x.shape:
                raise ValueError(f"replacement of {hook} has shape {list(new.shape)}, not {list(x.shape)}")
            return new.to(x.device, x.dtype)

        with self._hooked({hook: functools.partial(same_kind, hook) for hook in replace}):
            return self._forward(ids, attention_mask).logits.to(self.device)

    def _forward(self, ids: Tensor, attention_mask: Tensor | None) -> Any:
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device)
        return self.model(input_ids=ids.to(self.device), attention_mask=attention_mask, use_cache=False)

    @contextlib.contextmanager
    def _hooked(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for hook, edit in edits.items():
                stack.callback(_attach(self._module(hook), hook, edit).remove)
            yield

    def _module(self, hook: str) -> nn.Module:
        path = hook.removesuffix(":in")
        try:
            module = self.model.get_submodule(path)
        except AttributeError as error:
            raise ModelError(f"{self.identity.name} has no hook {hook!r}; `midiscover inspect` lists them.") from error
        return module


def load_tokenizer(identity: ModelIdentity) -> PreTrainedTokenizerBase:
    """The model's tokenizer, without its weights."""
    _be_quiet()
    folder = config_folder(identity)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The tokenizer of {identity.name} could not be loaded: {_first_line(error)}") from error


def compute_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """The torch dtype of a setting; `auto` is bfloat16 where the device computes in it natively, else float32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities()
            native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
        return torch.bfloat16 if native else torch.float32
    if name not in ("bfloat16", "float32"):
        # phi-2 in float16 with eager attention gives NaN from layer 30 on.
        raise ModelError(f"model.dtype {name!r} is not supported; it must be auto, bfloat16 or float32.")
    return getattr(torch, name)


def convert_gguf(gguf: Path, folder: Path, about: Mapping[str, str | None]) -> None:
    """De-quantise a GGUF file to a bfloat16 safetensors folder with tokenizer; `about` becomes its name file.

    The folder appears whole or not at all.
    """
    _be_quiet()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # a damaged file makes its reader raise anything
        raise ModelError(f"GGUF file {gguf} could not be read: {_first_line(error)}") from error
    # Loading took the quantisation away; the marks that remain of it would stop save_pretrained.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
        made = Path(temporary) / folder.name
        model.to(torch.bfloat16).save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / NAME_FILE).write_text(json.dumps(about))
        made.replace(folder)


def hook_facts(folder: Path) -> dict[str, Any]:
    """What `models.hook_table` keeps of a model: its dimensions, and for each hook its width and its cost.

    From the config alone: a forward pass of [2, 61] tokens on the meta device, which computes shapes only. A hook's
    cost is [linear, attention] FLOPs per token of all that ran before it; attention per token of context, causal.
    Where a model's code needs real numbers to run, the modules' own sizes in order of definition stand in.
    """
    _be_quiet()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder} is no causal language model of transformers: {_first_line(error)}") from error
    text = config.get_text_config()
    try:
        hooks, full = _dry_run(model.eval())
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        hooks, full = _sizes(model, text.hidden_size)
    return {
        "n_layers": text.num_hidden_layers,
        "d_model": text.hidden_size,
        "vocab_size": _embedding_rows(model),
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
                stack.callback(_attach(module, hook, functools.partial(note, hook)).remove)
        # A mask is given because without one transformers looks at the position ids' values.
        with torch.no_grad(), meter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return hooks, meter.per_token()


def _sizes(model: PreTrainedModel, d_model: int) -> tuple[_HookFacts, tuple[float, float]]:
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
    """The MLP output projections at 1/3, 1/2 and 2/3 of the depth: where SAEs on MLP outputs are usually trained."""
    chosen = []
    for layer in sorted({min(round(n_layers * share), n_layers - 1) for share in (1 / 3, 1 / 2, 2 / 3)}):
        inside = [hook for hook in hooks if hook_layer(hook) == layer and not hook.endswith(":in")]
        linear = [hook for hook in inside if isinstance(model.get_submodule(hook), (nn.Linear, Conv1D))]
        in_mlp = [hook for hook in linear if _MLP_NAMES & set(hook.split("."))]
        whole_mlp = [hook for hook in inside if hook.rpartition(".")[2] in _MLP_NAMES]
        chosen += (in_mlp or whole_mlp or linear)[-1:]
    return chosen


class _AllFired(Exception):
    """Ends a forward pass whose further results nobody reads."""


def _attach(module: nn.Module, hook: str, edit: Edit) -> torch.utils.hooks.RemovableHandle:
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


def _embedding_rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


def _supports_sdpa(model: Any) -> bool:
    return bool(model._supports_sdpa)  # public only as an error while loading


def _be_quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def main(argv: list[str]) -> int:
    """Answer `models.run_module` with one line of JSON on stdout; everything else goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            match argv:
                case ["table", folder]:
                    answer = hook_facts(Path(folder))
                case ["convert", gguf, folder, about]:
                    convert_gguf(Path(gguf), Path(folder), json.loads(about))
                    answer = {}
                case _:
                    raise ModelError("usage: python -m midiscover.lm table FOLDER | convert GGUF FOLDER ABOUT")
    except ModelError as error:
        print(json.dumps({"error": str(error)}))
        return error.exit_code
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
