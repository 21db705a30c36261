"""Whose training steps are compared, at which settings, on which rows; light to import, for machines with little."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

from midiscover.calibrate import timed

STILL = 1e-7
"""Learning rate with which ours stays at the L0 that it begins with."""
PEERS = {
    ("SAELens", "standard"): ("tutorial", 3e-4, 5.0),
    ("SAELens", "topk"): ("step", 3e-4, None),
    ("dictionary_learning", "standard"): ("AprilUpdate", 3e-4, 5.0),
    ("dictionary_learning", "topk"): ("step", 3e-4, None),
    ("sparsify", "topk"): ("signum", 5e-3, None),
}
"""Trainer, learning rate and L1 coefficient; None: k."""


def planted(
    folder: Path, *, steps: int, batch: int, d_in: int, d_sae: int, l0: float, device: str | torch.device = "cpu"
) -> None:
    """Rows of a random dictionary, `l0` of whose atoms are in each, in the files that the runners read."""
    generator = torch.Generator(device).manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator, device=device), dim=1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def rows(count: int) -> torch.Tensor:
        made = []
        for part in torch.arange(count).split(4096):
            chance = drawn(len(part), d_sae)
            made.append((torch.where(chance < l0 / d_sae, drawn(*chance.shape), 0) @ atoms).bfloat16().cpu())
        return torch.cat(made)

    save_file({"rows": rows(steps * batch)}, folder / "train.safetensors")
    save_file({"rows": rows(2048)}, folder / "held_out.safetensors")


def kept(
    args: argparse.Namespace,
    machine: str,
    tables: Mapping[str, Mapping[str, Sequence[float]]],
    bounds: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """Write what was measured so far to the file of --json, where one is given.

    tables: kind -> side -> seconds a step, one a repeat; bounds: kind -> the same of the products that bound it.
    """
    if args.json is None:
        return
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    told = {"v": 1, "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "settings": settings}
    told |= {"seconds_a_step": tables, "bounds": bounds}
    args.json.write_text(json.dumps(told, indent=1) + "\n")


def described(device: torch.device, rate: float, *, small: bool = False) -> str:
    """The device, the versions and both rates that its shares depend on, in a line; copies count reads and writes."""
    numbers = torch.empty(2**20 if small else 2**28, device=device)
    copy, repeats = torch.empty_like(numbers), 10
    copy.copy_(numbers)
    moved = 2 * numbers.nbytes * repeats / timed(lambda: [copy.copy_(numbers) for _ in range(repeats)], device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rates = f"{rate / 1e12:.2f} TFLOP/s in bfloat16, copies at {moved / 1e12:.2f} TB/s"
    return f"{name}, torch {torch.__version__}, {rates}"


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of bfloat16 products of random square matrices: what a device's shares are shares of."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    repeats = 20
    return 2 * size**3 * repeats / timed(lambda: [torch.mm(a, b) for _ in range(repeats)], device)
