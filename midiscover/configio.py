"""Strict YAML and flags into a `RunConfig`; the grid into its points. The only reader of settings.

Flags (`--train.lr 1e-3`) are set in the YAML's tree before it is checked, so that a flag and a line of YAML are read by
one rule and fail with one sentence. Loads neither torch nor ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from midiscover.config import RunConfig, SaePoint
from midiscover.cores import native_bfloat16
from midiscover.errors import ConfigError
from midiscover.hooknames import expand_braces
from midiscover.saeconfig import SAE_KINDS, SaeConfig
from midiscover.yamltext import in_a_list, load_yaml, yaml_problem

T = TypeVar("T")


def parse_value(text: str) -> Any:
    """A flag's value by the rules of YAML: `1e-3` is a number, `[1, 2]` a list, `null` nothing."""
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value '{text}' is not readable as YAML: {yaml_problem(error)}.") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The tree of a YAML file, unchecked. ConfigError where it is absent, broken or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no config file '{path}'. Give the path of a YAML file, such as {_example()}.")
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {yaml_problem(error)}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold settings as 'key: value', not {_kind(tree)}.")
    return tree


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML file strictly, set `overrides` (dotted path -> value) over it, and validate the whole.

    ConfigError as well for a setting that would change no SAE: one of `overrides` in whose place every grid has an
    axis, or one of `sae` that no architecture of the grid has; and for one of `overrides` that is the default of
    `sae.kind`, beside architectures that would keep another default.
    """
    config = build_config(config_tree(path, overrides))
    _refuse_idle(config, overrides or {})
    return config


def config_tree(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `load_config` builds a config of: the settings as they are written, unchecked."""
    tree = read_yaml(path)
    tree.setdefault("name", re.sub(r"[^a-z0-9_-]+", "-", Path(path).stem.lower()))
    for dotted, value in (overrides or {}).items():
        if dotted == "grid" and tree.get("grid"):
            tree["grid"] = _with_axes(tree["grid"] if isinstance(tree["grid"], list) else [tree["grid"]], value)
        else:
            set_path(tree, dotted, value)
    return tree


def _with_axes(grids: list[Any], axes: Mapping[str, Any]) -> list[Any]:
    """An axis replaces that of the grids that have it, or comes to all where none has; the other axes stand."""
    for path, values in axes.items():
        having = [isinstance(grid, dict) and path in grid for grid in grids]
        grids = [
            grid | {path: values} if isinstance(grid, dict) and (has or not any(having)) else grid
            for grid, has in zip(grids, having, strict=True)
        ]
    return grids


def set_path(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `tree["train"]["lr"]` for `train.lr`, making the sections on the way."""
    *sections, last = dotted.split(".")
    for section in sections:
        if tree.get(section) is None:  # absent, or a section without a line
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"'{dotted}' names a setting inside '{section}', which is a value and no section.")
    tree[last] = value


def build_config(tree: Mapping[str, Any]) -> RunConfig:
    """A `RunConfig` from a plain tree. ConfigError names the first wrong key or value, and what would be right."""
    config: RunConfig = build_section(RunConfig, tree, "")
    hooks = tuple(hook for text in config.harvest.hooks for hook in expand_braces(text))
    twice = next((hook for i, hook in enumerate(hooks) if hook in hooks[:i]), None)
    if twice is not None:
        raise ConfigError(f"harvest.hooks names '{twice}' twice; each hook may stand once.")
    config = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, hooks=hooks))
    expand_grid(config)  # a wrong path or value in the grid is an error of this file, not of a later stage
    return resolve_dtypes(config)


def resolve_dtypes(config: RunConfig) -> RunConfig:
    """Replace `auto` by what this machine computes in natively, so that ids and records name a real dtype."""
    model, train = config.model, config.train
    if "auto" not in (model.dtype, train.dtype):
        return config
    native = "bfloat16" if native_bfloat16() else "float32"
    if model.dtype == "auto":
        model = dataclasses.replace(model, dtype=native)
    if train.dtype == "auto":
        train = dataclasses.replace(train, dtype=native)
    return dataclasses.replace(config, model=model, train=train)


def expand_grid(config: RunConfig) -> list[SaePoint]:
    """Every SAE of a sweep: hooks x each grid's values, in a fixed order. ConfigError for a wrong path."""
    points = [point for grid in config.grid or ({},) for point in _grid_points(config, grid)]
    if len(set(points)) < len(points):
        raise ConfigError("The grid names the same SAE twice; each value of an axis may stand once.")
    return sorted(points, key=lambda point: config.harvest.hooks.index(point.hook))


def _grid_points(config: RunConfig, grid: Mapping[str, tuple[Any, ...]]) -> list[SaePoint]:
    for path in grid:
        if path.split(".")[0] not in ("sae", "train") or path.count(".") != 1:
            raise ConfigError(
                f"grid.{path} is not a setting of an SAE; an axis is a path in 'sae' or 'train', "
                "such as sae.l1_coefficient (the hooks of harvest.hooks are an axis by themselves)."
            )
    points: list[SaePoint] = []
    for values in itertools.product(*grid.values()):
        tree = {"sae": _given(config.sae), "train": _given(config.train)}
        chosen = dict(zip(grid, values, strict=True))
        kind = chosen.get("sae.kind", config.sae.kind)
        cls = _architecture(kind, "sae")
        if kind != config.sae.kind:
            set_here = {name: value for name, value in _set_in(config.sae).items() if _has(cls, name)}
            tree["sae"] = {name: value for name, value in set_here.items() if not _passed_over(config, grid, name)}
        for path, value in chosen.items():
            name = path.removeprefix("sae.")
            if name != path and not _has(cls, name) and any(_has(other, name) for other in SAE_KINDS.values()):
                raise ConfigError(f"grid.{path} is an axis that {kind} SAEs lack; give them a grid of their own.")
            set_path(tree, path, value)
        sae = _build_sae(tree["sae"], "sae")
        train = build_section(type(config.train), tree["train"], "train")
        points += [SaePoint(hook=hook, sae=sae, train=train) for hook in config.harvest.hooks]
    return points


def _kinds(config: RunConfig, grid: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
    return grid.get("sae.kind", (config.sae.kind,))


def _passed_over(config: RunConfig, grid: Mapping[str, tuple[Any, ...]], name: str) -> bool:
    """Whether a grid of other architectures alone goes through coefficients, so that no L0 of `sae` is steered to."""
    through = not grid.keys().isdisjoint(("sae.l1_coefficient", "sae.l0_coefficient"))
    return name == "target_l0" and through and config.sae.kind not in _kinds(config, grid)


def _fits_all(config: RunConfig, name: str) -> bool:
    """Whether a flag `--grid.sae.<name>` comes to every grid and is taken there: none has it yet, and all may."""
    kinds = {kind for grid in config.grid for kind in _kinds(config, grid)}
    return all(_has(SAE_KINDS[kind], name) for kind in kinds) and not any(f"sae.{name}" in grid for grid in config.grid)


def _refuse_idle(config: RunConfig, overrides: Mapping[str, Any]) -> None:
    """ConfigError for a setting that would silently change no SAE; see `load_config`."""
    grids = config.grid or ({},)
    given = [path for path in overrides if path.startswith(("sae.", "train."))]
    for path in dict.fromkeys([*given, *(f"sae.{name}" for name in _set_in(config.sae))]):
        name = path.removeprefix("sae.")
        standing = [grid for grid in grids if path not in grid and not _passed_over(config, grid, name)]
        kinds = {kind for grid in standing for kind in _kinds(config, grid)}
        if any(name == path or _has(SAE_KINDS[kind], name) for kind in kinds):
            if path in given and name != path:
                _refuse_default(config, name, kinds)
            continue
        if len(standing) == len(grids):
            raise ConfigError(f"{path} is no setting of the architectures in the grid, {', '.join(sorted(kinds))}.")
        if path in given:
            axis, sets = in_a_list(overrides[path]), any(path in grid for grid in grids)
            why = "sets it" if sets else "goes through the coefficient"
            there = f"write {path}: {axis} into that grid of the file"
            instead = f"give --grid.{path} '{axis}'" if sets or _fits_all(config, name) else there
            raise ConfigError(f"--{path} changes no SAE: the grid {why}; {instead}.")
    width = "grid.sae.d_sae" if all("sae.d_sae" in grid for grid in grids) else "sae.d_sae"
    has_width = config.sae.d_sae is not None or width.startswith("grid")
    if has_width and overrides.get("sae.expansion_factor") is not None:
        raise ConfigError(f"--sae.expansion_factor changes no SAE: {width} is set and goes before it; give --{width}.")


def _refuse_default(config: RunConfig, name: str, kinds: Iterable[str]) -> None:
    """ConfigError for a flag of `sae` with its default, where another architecture has another and would keep it."""
    value = getattr(config.sae, name)
    others = [SAE_KINDS[kind]() for kind in sorted(kinds) if _has(SAE_KINDS[kind], name)]
    keeps = [other.kind for other in others if getattr(other, name) != value]
    if name not in _set_in(config.sae) and keeps:
        flag = f"give --grid.sae.{name} '{in_a_list(value)}', which holds for all"
        own = f"give those a grid of their own in the file, with sae.{name}: {in_a_list(value)}"
        raise ConfigError(
            f"--sae.{name} {value} is the default of {config.sae.kind} and does not go over to {', '.join(keeps)}; "
            f"{flag if _fits_all(config, name) else own}."
        )


def to_tree(config: Any) -> Any:
    """A config as plain JSON data: dataclasses to dicts, tuples to lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_tree(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_tree(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_tree(value) for value in config]
    return config


def to_yaml(config: Any, *, ascii_only: bool = True) -> str:
    """A config as YAML that reads back to an equal one; ascii_only: other characters as escapes."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=not ascii_only, width=100)


def _given(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _set_in(sae: SaeConfig) -> dict[str, Any]:
    """What differs from its default, which may be another one for another architecture."""
    return {name: value for name, value in _given(sae).items() if value != getattr(type(sae)(), name)}


def _has(cls: type[SaeConfig], name: str) -> bool:
    return name in cls.__dataclass_fields__


def build_section(cls: type[T], tree: Any, path: str = "") -> T:
    """One dataclass from a mapping: unknown keys refused, each value of its declared type."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path or 'The config'} must be a section of settings, not {_kind(tree)}.")
    hints = typing.get_type_hints(cls)
    known: Any = cls
    fields = {field.name: hints[field.name] for field in dataclasses.fields(known)}
    for key in tree:
        if key not in fields:
            raise ConfigError(_unknown_key(str(key), fields, path))
    values: dict[str, Any] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        if known is RunConfig and key == "sae":
            values[key] = _build_sae({} if value is None else value, here)
        elif dataclasses.is_dataclass(fields[key]):
            values[key] = build_section(typing.cast(type, fields[key]), {} if value is None else value, here)
        else:
            values[key] = _check(fields[key], value, here)
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None


def _build_sae(tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path} must be a section of settings, not {_kind(tree)}.")
    return build_section(_architecture(tree.get("kind", "standard"), path), tree, path)


def _architecture(kind: Any, path: str) -> type[SaeConfig]:
    if not isinstance(kind, str) or kind not in SAE_KINDS:
        raise ConfigError(f"{path}.kind is {_show(kind)}, which is no architecture; known are {', '.join(SAE_KINDS)}.")
    return SAE_KINDS[kind]


def _check(hint: Any, value: Any, path: str) -> Any:
    """A value of the declared type, by pydantic's strict rules; lists become tuples, one string a list of hooks."""
    if isinstance(value, str) and hint == tuple[str, ...]:
        value = (value,)
    if path == "grid":
        grids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return tuple(_grid(grid) for grid in grids)
    try:
        return _adapter(hint).validate_python(_tuples(value))
    except ValidationError:
        raise ConfigError(f"{path} is {_show(value)}; it must be {_describe(hint)}.") from None


def _grid(value: Any) -> dict[str, tuple[Any, ...]]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"grid must be a section of 'path: [values]', or a list of such sections, not {_kind(value)}."
        )
    return {str(key): _axis(axis, f"grid.{key}") for key, axis in value.items()}


def _axis(value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{path} is {_show(value)}; it must be a list of values, such as [1, 2, 5].")
    return typing.cast(tuple[Any, ...], _tuples(value))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _unknown_key(key: str, known: Sequence[str] | Mapping[str, Any], path: str) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    place = f"'{path}'" if path else "the config"
    full = f"{path}.{key}" if path else key
    kinds = [kind for kind, cls in SAE_KINDS.items() if path == "sae" and _has(cls, key)]
    if kinds:  # of an architecture, but not of this one
        return f"'{full}' is a setting of {', '.join(kinds)}, and not of the sae.kind that is given."
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}."
    return f"'{full}' is not a setting of {place}; {hint}"


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    tuple[str, ...]: "a list of texts",
    tuple[float, float]: "a list of two numbers",
    tuple[float, ...]: "a list of numbers",
}


def _describe(hint: Any) -> str:
    if hint in _NAMES:
        return _NAMES[hint]
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(hint))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return str(hint)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _example() -> str:
    return "jobs/configs/demo.yaml, or the name of one that ships with miDiscover, such as 'demo'"


def find_config(name: str) -> Path:
    """The file that CONFIG means: a path, or the bare name of a config that ships in jobs/configs."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(__file__).resolve().parent.parent / "jobs" / "configs"
    if re.fullmatch(r"[a-z0-9_-]+", name) and (shipped / f"{name}.yaml").is_file():
        return shipped / f"{name}.yaml"
    if path.is_dir():
        raise ConfigError(f"'{name}' is a folder; CONFIG is a YAML file, such as {_example()}.")
    raise ConfigError(f"There is no config file '{name}'. Give the path of a YAML file, such as {_example()}.")


def names_config(name: str) -> bool:
    """Whether an argument that may be the id of a sweep or an SAE means a config: a YAML file, or one that ships."""
    if name.endswith((".yaml", ".yml")):
        return True
    if re.fullmatch(r"[a-z0-9_-]+", name) is None:
        return False
    try:
        find_config(name)
    except ConfigError:
        return False
    return True
