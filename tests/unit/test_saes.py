"""Where `load_sae` looks for what it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from midiscover import load_sae, saes
from midiscover.errors import NotFoundError


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
