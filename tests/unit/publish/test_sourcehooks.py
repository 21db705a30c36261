"""Where an SAE of another maker is read, by either of two namings."""

from __future__ import annotations

import pytest

from midiscover.errors import ModelError
from midiscover.hooks import HookInfo, HookTable
from midiscover.publish.sourcehooks import SourceHooks, find_hook


def table(*paths: str, recommended: tuple[str, ...] = ()) -> HookTable:
    hooks = {
        path: HookInfo(path=path, d_in=8, layer=1, flops_per_token=1.0, recommended=path in recommended)
        for path in paths
    }
    return HookTable(
        model="tiny",
        n_layers=3,
        d_model=8,
        vocab_size=99,
        context_length=None,
        parameters=1,
        supports_sdpa=True,
        flops_per_token=1.0,
        hooks=hooks,
    )


PATHS = (
    "model.layers.1",
    "model.layers.1:in",
    "model.layers.1.self_attn.o_proj:in",
    "model.layers.1.mlp",
    "model.layers.1.mlp.down_proj",
    "model.norm",
)


@pytest.mark.parametrize(
    ("name", "path", "found"),
    [
        ("blocks.1.hook_mlp_out", None, "model.layers.1.mlp.down_proj"),
        ("blocks.1.hook_resid_post", None, "model.layers.1"),
        ("blocks.1.hook_resid_pre", None, "model.layers.1:in"),
        ("blocks.1.hook_mlp_out", "model.layers.1.mlp", "model.layers.1.mlp"),
        ("blocks.1.hook_resid_post", "model.layers.1.output", "model.layers.1"),
        ("model.norm", None, "model.norm"),
        ("blocks.1.attn.hook_z", None, "model.layers.1.self_attn.o_proj:in"),
    ],
)
def test_hooks_are_found_by_either_name(name: str, path: str | None, found: str) -> None:
    assert find_hook(table(*PATHS), "llama", path=path, name=name, flag="--hook") == found
    assert SourceHooks.of({"hook_point": name, "hf_hook_name": path}) == (name, path, None, None)


def test_the_recommended_of_several_paths_is_taken() -> None:
    chosen = table(*PATHS, recommended=("model.layers.1.mlp",))
    assert find_hook(chosen, "llama", path=None, name="blocks.1.hook_mlp_out", flag="--hook") == "model.layers.1.mlp"


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        (None, None, "does not say where the SAE is read; give --hook PATH"),
        (
            "blocks.7.hook_mlp_out",
            None,
            "'blocks.7.hook_mlp_out' is none of tiny's module paths, and which of .* not known here",
        ),
        (None, "model.layers.9.mlp", "layer 9 is out of range; tiny has layers 0 to 2"),
    ],
)
def test_hooks_that_are_not_there_are_told(name: str | None, path: str | None, message: str) -> None:
    found = table(*PATHS, "model.layers.0.mlp")
    with pytest.raises(ModelError, match=message):
        find_hook(found, "llama", path=path, name=name, flag="--hook")
