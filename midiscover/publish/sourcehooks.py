"""Where an SAE of another maker is read: its hook names as module paths of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from midiscover.errors import ModelError
from midiscover.hooknames import transformer_lens_hook
from midiscover.hooks import HookTable


class SourceHooks(NamedTuple):
    """What a source says of its hooks; None where it says nothing."""

    name: str | None
    """Of TransformerLens, or a module path."""
    path: str | None
    """Module path."""
    output_name: str | None
    """Of what a transcoder predicts."""
    output_path: str | None

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Self:
        """From the metadata of a cfg.json, a cfg.json before version 6, or the config of the seed project."""

        def first(*keys: str) -> str | None:
            values = (about.get(key) for key in keys)
            return next((value for value in values if isinstance(value, str) and value), None)

        return cls(
            name=first("hook_name", "hook_point"),
            path=first("hf_hook_name", "layer_name"),
            output_name=first("hook_name_out"),
            output_path=first("hf_hook_name_out"),
        )


def find_hook(table: HookTable, model_type: str | None, *, path: str | None, name: str | None, flag: str) -> str:
    """The module path that is meant: `path` where the model has it, else the one that TransformerLens calls `name`.

    `flag` is what names it on the command line. ModelError where neither leads to a hook.
    """
    for given in (path, name):
        for candidate in (given, given and given.removesuffix(".output")):
            if candidate and candidate in table.hooks:
                return candidate
    if name is None and path is None:
        raise ModelError(
            f"The source does not say where the SAE is read; give {flag} PATH, as `midiscover inspect` lists."
        )
    same = [hook for hook in table.hooks if name and transformer_lens_hook(hook, model_type) == name]
    if same:
        # One place under several paths (an MLP and its last projection): the one that harvests usually have.
        return next((hook for hook in same if hook in table.recommended), max(same, key=len))
    if path is not None and name in (None, path):
        table.require(path)  # names the nearest ones
    raise ModelError(
        f"The hook '{name}' is none of {table.model}'s module paths, and which of them TransformerLens calls so is not "
        f"known here; give {flag} PATH, as `midiscover inspect` lists them."
    )
