"""What a command is about: SAEs, named by a config, a sweep or themselves. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from midiscover.config import RunConfig
from midiscover.configio import build_config, find_config, load_config, names_config, set_path
from midiscover.errors import ConfigError, CorruptError, NotFoundError
from midiscover.resolve import resolve
from midiscover.store import layout
from midiscover.store.documents import folders_with, read_json
from midiscover.store.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Committed SAEs, and the sweep they belong to where one was named."""

    saes: tuple[str, ...]
    """Ids, in the order of the sweep's grid."""
    sweep_id: str | None = None
    config: RunConfig | None = None
    """The sweep's settings."""
    record: Mapping[str, Any] | None = None
    """The sweep's sweep.json."""


def find_target(storage: Storage, name: str, overrides: Mapping[str, Any] | None = None) -> Target:
    """The SAEs that `name` means: a config (a file, or one that ships), else a sweep, else an SAE, by unique prefix.

    `overrides` (dotted path -> value) go over the config's settings or the sweep's. NotFoundError where nothing or
    more than one thing fits, or where a sweep has no finished SAE.
    """
    if names_config(name):
        config = load_config(find_config(name), overrides)
        return _of_sweep(storage, resolve(config, storage.uri).sweep_id, config)
    sweeps = [found for found in folders_with(storage, layout.SWEEPS, "sweep.json") if _fits(found, name)]
    saes = [found for found in folders_with(storage, layout.SAES, "record.json") if _fits(found, name)]
    exact = [found for found in (*sweeps, *saes) if found == name]
    found = exact or [*sweeps, *saes]
    if len(found) > 1:
        raise NotFoundError(f"'{name}' fits {', '.join(found[:5])} in {storage.uri}; give more of the id.")
    if not found:
        raise NotFoundError(
            f"There is no config, sweep or SAE '{name}' in {storage.uri}; `midiscover runs list` shows its sweeps."
        )
    if found[0] in sweeps:
        return _of_sweep(storage, found[0], None, overrides)
    if overrides:
        raise ConfigError(f"Settings such as --{next(iter(overrides))} go with a config or a sweep, not with an SAE.")
    return Target(saes=(found[0],))


def find_sae(storage: Storage, name: str) -> str:
    """The id of the one SAE that `name` means. ConfigError for a sweep, though it may have a single SAE."""
    target = find_target(storage, name)
    if target.sweep_id is not None:
        raise ConfigError(f"'{name}' is a sweep; give one of its SAEs, such as {target.saes[0]}.")
    return target.saes[0]


def _of_sweep(
    storage: Storage, sweep_id: str, config: RunConfig | None, overrides: Mapping[str, Any] | None = None
) -> Target:
    sweep = read_json(storage, layout.sweep_record(sweep_id))
    if sweep is None:
        raise NotFoundError(f"{storage.uri} holds no sweep {sweep_id}; run `midiscover sweep` with this config first.")
    committed = set(folders_with(storage, layout.SAES, "record.json"))
    saes = tuple(name for name in sweep["sae_ids"] if name in committed)
    if not saes:
        raise NotFoundError(f"The sweep {sweep_id} has no finished SAE yet; run `midiscover sweep` again to go on.")
    if config is None:
        config = _config_of(sweep, overrides or {})
    return Target(saes=saes, sweep_id=sweep_id, config=config, record=sweep)


def _config_of(sweep: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunConfig:
    tree = sweep.get("config")
    if not isinstance(tree, dict):
        raise CorruptError(f"The sweep.json of {sweep.get('id')} lacks its settings.")
    tree = {section: dict(value) if isinstance(value, dict) else value for section, value in tree.items()}
    for dotted, value in overrides.items():
        set_path(tree, dotted, value)
    return build_config(tree)


def _fits(found: str, name: str) -> bool:
    return found == name or found.startswith(name)
