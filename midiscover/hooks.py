"""The hooks of a model: what is known of each, and which can't be there, told without loading the model or torch.

The full table comes from `models.hook_table`, which needs seconds the first time. `refuse_impossible` answers before
it, from config.json and the source code of transformers alone, and only where the table would refuse as well: whatever
is in doubt is left to the table.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midiscover.errors import ModelError
from midiscover.hooknames import LAYER_LISTS
from midiscover.ids import hook_layer

_LAYER = re.compile(r"(?<=\.)\d+(?=\.|:|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class HookInfo:
    """One place where activations can be read."""

    path: str
    """Module path (its output), or `path:in` (its input)."""
    d_in: int
    """Width of the activations read there."""
    layer: int | None
    flops_per_token: float
    """Floating-point operations of a forward pass that stops here, per token, with causal attention."""
    recommended: bool

    @property
    def bytes_per_token(self) -> int:
        """Size of one bfloat16 activation."""
        return 2 * self.d_in


@dataclass(frozen=True, kw_only=True, slots=True)
class HookTable:
    """All hooks of a model in the order in which they fire, with its dimensions."""

    model: str
    n_layers: int
    d_model: int
    vocab_size: int
    context_length: int | None
    """Longest context the model was made for, where its config says so."""
    parameters: int
    supports_sdpa: bool
    """Whether `model.attention: sdpa` works; Gemma-2 needs `eager`."""
    flops_per_token: float
    """Of a whole forward pass with logits."""
    hooks: Mapping[str, HookInfo]

    @property
    def recommended(self) -> tuple[str, ...]:
        """MLP output projections at about 1/3, 1/2 and 2/3 of the depth."""
        return tuple(path for path, info in self.hooks.items() if info.recommended)

    def require_attention(self, attention: str) -> None:
        """ModelError where the model can't run with this implementation of attention."""
        if attention == "sdpa" and not self.supports_sdpa:
            raise ModelError(f"{self.model} does not run with model.attention: sdpa; set it to eager.")

    def require(self, hook: str) -> HookInfo:
        """The hook's facts. ModelError names the valid layers or the nearest hooks where there is none."""
        if hook in self.hooks:
            return self.hooks[hook]
        layer = hook_layer(hook)
        if layer is not None and layer >= self.n_layers and _LAYER.sub("0", hook, count=1) in self.hooks:
            raise _out_of_range(hook, layer, self.model, self.n_layers)
        raise _unknown(hook, self.model, self.hooks, f"try {', '.join(self.recommended)}")


def _out_of_range(hook: str, layer: int, model: str, n_layers: int) -> ModelError:
    return ModelError(f"Hook {hook!r}: layer {layer} is out of range; {model} has layers 0 to {n_layers - 1}.")


def _unknown(hook: str, model: str, hooks: Iterable[str], otherwise: str) -> ModelError:
    nearest = difflib.get_close_matches(hook, list(hooks), n=3, cutoff=0.5)
    hint = f"nearest are {', '.join(nearest)}" if nearest else otherwise
    return ModelError(f"{model} has no hook {hook!r}; {hint}.")


def refuse_impossible(hooks: Sequence[str], *, model: str, config: Mapping[str, Any], weights: Sequence[str]) -> None:
    """ModelError for the first hook that no table of this model can hold; what it says is what the table would say.

    `config` is the content of config.json. `weights` are the names of the model's tensors, where they are known: they
    give the nearest hooks, and keep a layer that has weights from being refused.
    """
    sources = _sources(config)
    words = None if sources is None else _words(sources)
    for hook in hooks:
        if sources is not None and words is not None and not _may_be_there(hook, weights, sources, words):
            raise _unknown(hook, model, _modules_near(hook, weights, words), "`midiscover inspect` lists its hooks")
        layer, n_layers = hook_layer(hook), _layer_count(config)
        if layer is not None and n_layers is not None and _is_beyond(hook, layer, config, weights):
            raise _out_of_range(hook, layer, model, n_layers)


_COUNT_NAMES = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_ANY_COUNT = re.compile(r"(n|num)_(\w+_)?layers?|(encoder|decoder)_layers")
_LISTS = tuple(f".{name}" for name in (*LAYER_LISTS, "experts"))


def _layer_count(config: Mapping[str, Any]) -> int | None:
    for part in (config, config.get("text_config")):
        counts = [part[name] for name in _COUNT_NAMES if name in part] if isinstance(part, Mapping) else []
        if counts:
            return counts[0] if isinstance(counts[0], int) else None
    return None


def _is_beyond(hook: str, layer: int, config: Mapping[str, Any], weights: Sequence[str]) -> bool:
    """Whether a layer lies behind every count of layers in the config, and none of the weights is in it."""
    counts = [value for name, value in _entries(config) if _ANY_COUNT.fullmatch(name) and isinstance(value, int)]
    parts = hook.removesuffix(":in").split(".")
    place = parts.index(str(layer)) if str(layer) in parts else 0
    if layer < max(counts) or place == 0 or parts[place - 1] not in LAYER_LISTS:
        return False
    return not any(f".{parts[place - 1]}.{layer}." in f".{name}" for name in weights)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings of a config and of those nested in it."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from _entries(value)


_WORD = re.compile(r"\.([A-Za-z_]\w*)|[\"']([A-Za-z_]\w*)[\"']")
_SIBLING = re.compile(r"from \.\.(\w+)")
# Modules whose names the code puts together while it runs; what rotary embeddings set like that are no modules.
_COMPOSED = re.compile(r"""\b(setattr\((?!self, f"{layer_type}_)|add_module\(|register_module\(|ModuleDict\()""")


def _is_spelled(hook: str, words: frozenset[str]) -> bool:
    return all(part.isdigit() or part in words for part in hook.removesuffix(":in").split("."))


def _may_be_there(hook: str, weights: Sequence[str], sources: Sequence[str], words: frozenset[str]) -> bool:
    """False where a word of the hook is none of the model's, or stands where its class assigns no such attribute.

    The class of a module is not known, but its parts with weights are: the classes whose code assigns all of them.
    """
    if not _is_spelled(hook, words):
        return False
    paths = {name.rpartition(".")[0] for name in weights}
    paths |= {path[: dot.start()] for path in paths for dot in re.finditer(r"\.", path)}
    place, parts = "", hook.removesuffix(":in").split(".")
    for part in parts:
        inner = f"{place}.{part}".lstrip(".")
        if inner not in paths:
            break
        place = inner
    else:
        return True
    children = {path.removeprefix(f"{place}.").partition(".")[0] for path in paths if path.startswith(f"{place}.")}
    if not place:
        children = {path.partition(".")[0] for path in paths}
    # A list has numbers for parts, and weights saved without the model's own prefix begin with one's parts.
    if not children or part.isdigit() or any(child.isdigit() for child in children):
        return True
    fitting = [attributes for attributes in _attributes(sources) if children <= attributes]
    return not fitting or any(part in attributes for attributes in fitting)


def _attributes(sources: Sequence[str]) -> list[frozenset[str]]:
    """Of each class in the source code, the attributes that its methods assign to `self`, those of its bases too."""
    own: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for text in sources:
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                targets = (inner for inner in ast.walk(node) if isinstance(inner, ast.Attribute))
                stored = {inner.attr for inner in targets if isinstance(inner.ctx, ast.Store)}
                own[node.name] = own.get(node.name, set()) | stored
                bases[node.name] = [ast.unparse(base) for base in node.bases]

    def inherited(name: str) -> set[str]:
        return own.get(name, set()).union(*(inherited(base) for base in bases.get(name, ()) if base != name))

    return [frozenset(inherited(name)) for name in own]


def _sources(config: Mapping[str, Any]) -> list[str] | None:
    """The code that the modules of this model come from; None where that can't be told.

    A module gets its name from an attribute, or a string, in the source code of the model's family. What stands there
    neither as the one nor as the other is the name of no module.
    """
    types = [value for name, value in _entries(config) if name == "model_type"]
    transformers, torch = _package("transformers"), _package("torch")
    if not types or transformers is None or torch is None:
        return None
    # The text part of a model that also sees (`gemma3_text`) lies with the whole.
    folders = {transformers / "models" / str(name).replace("-", "_").removesuffix("_text") for name in types}
    sources: list[str] = []
    for folder in folders:
        files = sorted(folder.glob("modeling_*.py"))
        if not files:
            return None
        sources += [file.read_text() for file in files]
    siblings = {transformers / "models" / name for text in sources for name in _SIBLING.findall(text)} - folders
    sources += [file.read_text() for folder in siblings for file in folder.glob("modeling_*.py")]
    if any(_COMPOSED.search(text) for text in sources):
        return None
    shared = (*(transformers / name for name in _OF_TRANSFORMERS), *(torch / "nn" / name for name in _OF_TORCH))
    return sources + [file.read_text() for file in shared if file.is_file()]


def _words(sources: Sequence[str]) -> frozenset[str]:
    """Every word that can be part of a module path of this model."""
    return frozenset(word for text in sources for pair in _WORD.findall(text) for word in pair if word)


# Where the modules lie that families share and that have parts.
_OF_TRANSFORMERS = ("activations.py", "modeling_layers.py", "pytorch_utils.py")
_OF_TORCH = ("modules/activation.py", "utils/parametrize.py", "utils/parametrizations.py")


def _package(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _modules_near(hook: str, weights: Sequence[str], words: frozenset[str]) -> list[str]:
    """Modules with weights, of the hook's layer where it has some; [] for weights whose names are no module paths."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in weights))
    # Saved without the prefix of the whole model, as GPT-2 on the hub: `h.0.mlp.c_proj`.
    if any(len(parts) > 1 and parts[1].isdigit() for parts in (name.split(".") for name in modules)):
        return []
    parents = [name[: at.start()] for name in modules for at in re.finditer(r"\.", name)]
    side = ":in" if hook.endswith(":in") else ""
    paths = [
        name + side
        for name in dict.fromkeys([*modules, *parents])
        # A list of layers or of experts does not run by itself, and experts are often stored one by one but run as one.
        if name and not name.endswith(_LISTS) and _is_spelled(name, words) and len(re.findall(r"\.\d+", name)) < 2
    ]
    same_layer = [path for path in paths if hook_layer(path) == hook_layer(hook)]
    return same_layer or paths
