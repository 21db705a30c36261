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
from torch import Tensor, nn

from midiscover.attach import (
    Edit,
    attach,
    be_quiet,
    embedding_rows,
    fuse_gelu,
    per_text,
    require_causal,
    why_not,
)
from midiscover.cards import is_out_of_memory
from midiscover.compiled import CompiledAttention
from midiscover.config import Dtype
from midiscover.errors import ModelError
from midiscover.hookfacts import hook_facts
from midiscover.modelfiles import NAME_FILE
from midiscover.models import ModelIdentity, config_folder, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        if self.device.type == "cuda":
            fuse_gelu(model)
        self.compiled: CompiledAttention | None = None
        self.vocab_size = embedding_rows(model)
        """Embedding rows; may be more than the tokenizer has ids (phi-2: 51,200)."""

    @classmethod
    def load(
        cls,
        identity: ModelIdentity,
        *,
        dtype: Dtype,
        attention: str = "sdpa",
        device: str | torch.device = "cpu",
        device_map: str | dict[str, str] | None = None,
    ) -> LanguageModel:
        """Load the weights and the tokenizer; a hub model is downloaded once per machine. Raises ModelError.

        device_map: how the layers are spread over devices instead, as accelerate takes it: `balanced`, over all GPUs.
        """
        from transformers import AutoModelForCausalLM

        be_quiet()
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
        except Exception as error:  # files that contradict each other make a model's code raise anything
            if is_out_of_memory(error):
                raise _too_large(identity) from error
            raise ModelError(f"Model {identity.name} could not be loaded from {folder}: {why_not(error)}") from error
        model, report = loaded
        require_causal(model, identity.name)
        absent = _absent(report)
        if absent:
            raise ModelError(
                f"The weights of {identity.name} lack or do not fit {absent[0]}; the folder is incomplete."
            )
        try:
            placed = model if device_map else model.to(device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise _too_large(identity, device) from error
            raise
        return cls(identity, placed, load_tokenizer(identity))

    def compile(self) -> None:
        """Make passes on a GPU faster by a fifth and more, after some seconds at the first; nothing on a CPU.

        Numbers differ by bfloat16's rounding. A model that is spread over several devices stays as it is.
        """
        alone = not getattr(self.model, "hf_device_map", None)
        if self.device.type == "cuda" and alone and self.compiled is None:
            self.compiled = CompiledAttention(self.model)

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
            with contextlib.suppress(_AllFired), self.hooked(edits):
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

        with self.hooked({hook: functools.partial(same_kind, hook) for hook in replace}):
            return self._forward(ids, attention_mask).logits.to(self.device)

    def _forward(self, ids: Tensor, attention_mask: Tensor | None) -> Any:
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device)
        return self.model(input_ids=ids.to(self.device), attention_mask=attention_mask, use_cache=False)

    @contextlib.contextmanager
    def hooked(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Every pass in the body goes through these edits."""
        shape: tuple[int, ...] = ()

        def begin(_model: nn.Module, _args: Any, given: Mapping[str, Any]) -> None:
            nonlocal shape
            shape = given["input_ids"].shape

        with contextlib.ExitStack() as stack:
            if self.compiled is not None:
                stack.enter_context(self.compiled.without(edits))
            stack.callback(self.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for hook, edit in edits.items():
                stack.callback(attach(self._module(hook), hook, per_text(edit, lambda: shape)).remove)
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
    from transformers import AutoTokenizer

    be_quiet()
    folder = config_folder(identity)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise ModelError(f"The tokenizer of {identity.name} could not be loaded: {why_not(error)}") from error


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


def _too_large(identity: ModelIdentity, device: torch.device | None = None) -> ModelError:
    """device: what it was moved to; None: memory ended where its files were read, in RAM or on several cards."""
    room = ""
    if device is not None and device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a card with no room for CUDA itself
            free, total = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device)  # most of it for what is loaded of the model by now
            room = f" ({free / 2**30:.1f} of {total / 2**30:.1f} GiB of the card are not held by other processes)"
    return ModelError(
        f"Model {identity.name} does not fit into the memory there is{room}; free {'the card' if device else 'some'}, "
        "or, in the settings of a run, spread it over several cards with resources.gpus_per_model, or give model.dtype "
        "bfloat16, which takes half of float32's."
    )


def _absent(report: Mapping[str, Any]) -> list[Any]:
    """Tensors of a model that its files lack or do not fit; transformers only warns and goes on with random numbers."""
    return sorted({*report["missing_keys"], *report["mismatched_keys"]}, key=str)


def convert_gguf(gguf: Path, folder: Path, about: Mapping[str, str | None]) -> None:
    """De-quantise a GGUF file to a bfloat16 safetensors folder with tokenizer; `about` becomes its name file.

    The folder appears whole or not at all.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    be_quiet()
    try:
        given = {"gguf_file": gguf.name, "trust_remote_code": False}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, output_loading_info=True, **given
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **given)
    except Exception as error:  # a damaged file makes its reader raise anything
        raise ModelError(f"GGUF file {gguf} could not be read: {why_not(error)}") from error
    model, report = loaded
    absent = _absent(report)
    if absent:
        raise ModelError(f"GGUF file {gguf} lacks or does not fit {absent[0]}; of a split one, join its parts first.")
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


class _AllFired(Exception):
    """Ends a forward pass whose further results nobody reads."""


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
