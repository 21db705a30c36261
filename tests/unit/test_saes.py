"""Where `load_sae` looks for what it is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from midiscover import load_sae, saes
from midiscover.errors import MiDiscoverError, NotFoundError


def folder_of_an_sae(folder: Path, weight: float) -> Path:
    folder.mkdir()
    cfg = {"architecture": "standard", "d_in": 2, "d_sae": 3, "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = {"W_enc": torch.full((2, 3), weight), "b_enc": torch.zeros(3), "b_dec": torch.zeros(2)}
    save_file(tensors | {"W_dec": torch.eye(3)[:, :2].contiguous()}, folder / "sae_weights.safetensors")
    return folder


def weight_of(source: str | Path) -> float:
    return float(load_sae(source).module.state_dict()["W_enc"][0, 0])


def test_a_folder_is_found_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of_an_sae(tmp_path / "mine", 0.5)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in (folder, str(folder), f"{folder}/", "mine", "./mine", "link", "~/mine", "link/../mine", Path("mine")):
        assert weight_of(source) == 0.5, source
    monkeypatch.chdir(folder)
    assert [weight_of(source) for source in (".", "./", "../mine", Path())] == [0.5] * 4


def test_a_folder_below_the_root_is_none_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of_an_sae(tmp_path / "sae", 0.5)
    monkeypatch.chdir(tmp_path)
    opened: list[tuple[str, str]] = []
    monkeypatch.setattr(saes, "open_store", lambda uri, **_: uri)
    monkeypatch.setattr(saes, "_load", lambda storage, folder, _device: opened.append((storage, folder)))
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) in ("/sae/cfg.json", f"{tmp_path}/sae/cfg.json"))
    load_sae("/sae")  # where a container mounts it
    load_sae("sae")
    assert opened == [("/", "sae"), (str(tmp_path), "sae")]


@pytest.mark.parametrize("source", ["./none", "/none/of/it", "file:///none", Path("none")])
def test_a_folder_without_an_sae_is_named(source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match=f"There is no cfg.json in '{source}'; give the folder of an SAE"):
        load_sae(source)


def changed(folder: Path, cfg: Any, weights: dict[str, torch.Tensor]) -> Path:
    """An SAE of another maker, with another cfg.json or with other weights beside its own."""
    folder_of_an_sae(folder, 0.5)
    (folder / "cfg.json").write_text(json.dumps(cfg(json.loads((folder / "cfg.json").read_text()))))
    file = folder / "sae_weights.safetensors"
    save_file({name: value for name, value in (load_file(file) | weights).items() if value.numel()}, file)
    return folder


@pytest.mark.parametrize(
    ("cfg", "weights", "message"),
    [
        (lambda cfg: [cfg], {}, "holds no JSON object"),
        (lambda cfg: {"architecture": "standard", "d_sae": 3}, {}, "lack d_in, or it is no whole number"),
        (lambda cfg: cfg | {"d_in": "2"}, {}, "lack d_in, or it is no whole number"),
        (lambda cfg: cfg | {"d_sae": True}, {}, "lack d_sae, or it is no whole number"),
        (lambda cfg: cfg | {"architecture": ["standard"]}, {}, "architecture .* is not known; known are standard"),
        (lambda cfg: cfg | {"architecture": "topk"}, {}, "k is None in .*; a whole number above 0 is needed"),
        (lambda cfg: cfg | {"architecture": "topk", "k": 4}, {}, "k is 4 in .*; of 3 features, 1 to 3 can be kept"),
        (
            lambda cfg: cfg | {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True},
            {"W_dec": torch.empty(0)},
            "not those of a topk SAE of its widths: .*Missing.*W_dec",
        ),
        (lambda cfg: cfg, {"b_enc": torch.full((3,), float("nan"))}, "b_enc .* holds numbers that are not finite"),
        (lambda cfg: cfg, {"scaling_factor": torch.full((3,), 2.0)}, "scaling_factor that is not 1"),
    ],
)
def test_a_folder_of_another_maker_that_is_not_whole_is_refused(
    tmp_path: Path, cfg: Callable[[Any], Any], weights: dict[str, torch.Tensor], message: str
) -> None:
    folder = changed(tmp_path / "sae", cfg, weights)
    with pytest.raises(MiDiscoverError, match=message) as caught:
        load_sae(folder)
    assert str(folder) in str(caught.value)


def test_a_scaling_factor_of_1_changes_nothing(tmp_path: Path) -> None:
    assert weight_of(changed(tmp_path / "sae", lambda cfg: cfg, {"scaling_factor": torch.ones(3)})) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_half_the_precision_are_computed_with_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """A TopK SAE whose selection counts decoder norms, against the formula in float64 of the same stored numbers."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    stored = {name: torch.randn(*shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    cfg = {"architecture": "topk", "d_in": 16, "d_sae": 64, "k": 10, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    save_file(stored, tmp_path / "sae_weights.safetensors")
    x, w = torch.randn(100, 16, generator=draw), {name: value.double() for name, value in stored.items()}
    pre = ((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * w["W_dec"].norm(dim=1)
    kept = pre.topk(10, dim=1)
    exact = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    features = load_sae(tmp_path).encode(x)
    assert float((features - exact).abs().max()) < 1e-5 * float(exact.max())
