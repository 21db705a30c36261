"""Rates of a device: of a sheet against sums by hand, kept and found by name, measured where a hook is free."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.harvest import model_place
from jobs.runtime import Slots
from midiscover.calibrate import _passes
from midiscover.cli import main
from midiscover.configio import load_config
from midiscover.errors import ConfigError, NotFoundError
from midiscover.rates import SHEETS, known_rates, of_sheet, read_rates, write_rates
from midiscover.resolve import resolve
from midiscover.store.local import LocalStorage
from tests.runs import write_run
from tests.unit.test_plan import RATES

HALF = ("bfloat16", "bfloat16")


def test_rates_come_back_as_they_were_kept(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    gpu = replace(RATES, device="NVIDIA H200", memory=1e11)
    assert write_rates(storage, RATES) == "rates/cpu.json"
    write_rates(storage, gpu)
    assert read_rates(storage, "cpu") == RATES
    assert read_rates(storage, "h200") == gpu


def test_a_sheet_tells_bfloat16_from_float32() -> None:
    """An H200: 989 TFLOP/s in bfloat16, 67 in float32 without tensor cores, 4.8 TB/s."""
    half, plain = of_sheet("h200", *HALF), of_sheet("H200", "float32", "float32")
    traffic = 1 / (2048 * 0.9 * 4.8e12)
    assert half.steps["topk"].token == pytest.approx(5 / (0.65 * 989e12) + 20 * traffic)
    assert plain.steps["topk"].token == pytest.approx(5 / (0.65 * 67e12) + 40 * traffic)
    assert (half.model_flops, plain.model_flops) == pytest.approx((0.45 * 989e12, 0.45 * 67e12))
    assert half.encode == plain.encode == pytest.approx(2 / (0.65 * 67e12)), "SAEs are evaluated in float32"
    assert (plain.model_dtype, plain.train_dtype) == ("float32", "float32")


def test_a_name_is_made_of_whole_words(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for device in ("NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"):
        write_rates(storage, replace(RATES, device=device))
    assert known_rates(storage, "a100", *HALF).device == "NVIDIA A100-SXM4-80GB"
    assert known_rates(storage, "L40S", *HALF).device == "NVIDIA L40S"
    assert known_rates(storage, "h100-pcie", *HALF).device == "NVIDIA H100 PCIe"
    for other in ("a10", "l4"):
        assert known_rates(storage, other, *HALF).measured is None
    with pytest.raises(NotFoundError, match="has no rates of a10; it has those of nvidia-a100-sxm4-80gb, "):
        read_rates(storage, "a10")
    with pytest.raises(ConfigError, match="several devices called h100: nvidia-h100-80gb-hbm3, nvidia-h100-pcie;"):
        known_rates(storage, "h100", *HALF)


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H200", "h200"), ("nvidia h100 sxm", "h100"), ("NVIDIA H100 80GB HBM3", "h100"), ("A100-80G", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("a100-40g", "a100-40g"), ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("A10G", "a10g"), ("l4", "l4"), *((sheet.name, key) for key, sheet in SHEETS.items()),
    ],
)  # fmt: skip
def test_a_sheet_is_found_by_any_name_of_its_gpu(tmp_path: Path, name: str, sheet: str) -> None:
    assert of_sheet(name, *HALF) == of_sheet(sheet, *HALF)
    assert of_sheet(sheet, *HALF).device == SHEETS[sheet].name
    write_rates(LocalStorage(tmp_path), replace(RATES, device="NVIDIA A100-SXM4-80GB"))
    assert (known_rates(LocalStorage(tmp_path), name, *HALF).measured is not None) == (sheet == "a100")


@pytest.mark.parametrize("name", ["h100-pcie", "a1000", "a100-64g", "a", "gpu", ""])
def test_another_gpu_has_no_sheet(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--gpu {name} is not known"):
        of_sheet(name, *HALF)


def test_rates_of_an_older_midiscover_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="know no sae.kind gated"):
        replace(of_sheet("h100", *HALF), steps={}).step("gated")
    storage = LocalStorage(tmp_path)
    key = write_rates(storage, RATES)
    tree = json.loads(storage.read(key)) | {"v": 1}
    del tree["model_dtype"], tree["train_dtype"]
    storage.write(key, json.dumps(tree).encode())
    with pytest.raises(ConfigError, match=r"rates/cpu.json is of another version .* measures it anew"):
        read_rates(storage, "cpu")


def test_a_sheet_stands_in_for_rates_of_an_older_midiscover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, store = write_run(tmp_path), tmp_path / "store"
    store.mkdir()
    storage = LocalStorage(store)
    for device in ("NVIDIA H200", "NVIDIA B200", "CPU"):
        key = write_rates(storage, replace(RATES, device=device))
        storage.write(key, json.dumps(json.loads(storage.read(key)) | {"v": 1}).encode())
    sheet = of_sheet("h200", *HALF)
    assert sheet.instead_of is None
    assert known_rates(storage, "H200", *HALF) == replace(sheet, instead_of="rates/nvidia-h200.json")
    for device, name in (("b200", "nvidia-b200"), ("cpu", "cpu")):
        with pytest.raises(ConfigError, match=f"rates/{name}.json is of another version"):
            known_rates(storage, device, *HALF)
    assert main(["plan", str(config), "--store", str(store), "--gpus", "8"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "NVIDIA H200, reckoned from its data sheet, not measured (rates/nvidia-h200.json is of another" in told
    write_rates(storage, replace(RATES, device="NVIDIA H200"))
    assert known_rates(storage, "H200", *HALF).measured == RATES.measured


def test_a_hook_before_the_first_product_leaves_no_rate_of_nothing(tmp_path: Path) -> None:
    resolved = resolve(load_config(write_run(tmp_path, harvest={"hooks": "model.embed_tokens"})))
    (hook,) = resolved.hooks
    assert resolved.table.require(hook).flops_per_token == 0
    lm = model_place(resolved, Slots(count=1, cpus=1, gpus=0, threads=1)).load()
    assert all(flops > 1e6 for flops in _passes(lm, resolved.table, hook))
