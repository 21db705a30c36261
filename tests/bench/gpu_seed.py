"""The first miDiscover's own case: from a cold start to an SAE that is no worse than the one its loop made.

    python -m tests.bench.gpu_seed                 # on a GPU: 48,000 steps of that loop come first, some minutes
    python -m tests.bench.gpu_seed --small         # the same program on a CPU, in seconds, to see that it runs

1,000 texts of 256 tokens, 3 epochs, one hook of phi-2, 20,480 features; the README of that time says 780 s. Its loop
(16 rows a step, float32, Adam at 3e-4, decoder columns set back to unit norm) is run on planted rows of that width,
without its harvest. Ours is a process of its own, timed from its start: it imports, makes a model of phi-2's shape with
random weights, runs it over as many tokens up to layer 16, and trains an SAE with an L1 penalty, as theirs has, on the
planted rows for --epochs epochs; with the first of --l1, then the next, smaller one, until its FVU on the same held-out
rows is no worse (with --k instead, TopK SAEs). The seconds in which rows are invented and SAEs judged are left out on
both sides. That loop's codes are dense, so L0 is printed too: a smaller FVU is had by more features a token. Judges
nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from midiscover import tables
from midiscover.calibrate import Nobody
from midiscover.config import TrainConfig
from midiscover.saeconfig import SaeConfig, StandardConfig, TopKConfig
from midiscover.train import Member, Trained, train
from tests.planted import PlantedDictionary, PlantedSource, folded

BATCH, LR, L1 = 16, 3e-4, 5e-4
"""Of that loop."""
HELD_OUT = 4096


class Shape(NamedTuple):
    """Of one run."""

    d_in: int
    d_sae: int
    n_true: int
    l0: int
    texts: int
    tokens: int
    batch_size: int

    @property
    def rows(self) -> int:
        """Training rows."""
        return self.texts * self.tokens


LARGE = Shape(2560, 20_480, 16_384, 64, 1000, 256, 128)
SMALL = Shape(64, 256, 128, 6, 64, 64, 64)
COEFFICIENTS = (0.02, 0.005, 0.001, 3.5e-4)
"""Of ours; the last is that loop's in this convention, at phi-2's width."""


def sae_of(setting: str, value: float) -> SaeConfig:
    """Ours: `l1` a coefficient, of an SAE half of whose features fire at first, as in that loop; `k` of a TopK SAE."""
    return StandardConfig(l1_coefficient=value, initial_density=None) if setting == "l1" else TopKConfig(k=int(value))


class Failed(Exception):
    """A try of ours ended with an error; the message is its last line."""


def planted(shape: Shape, device: torch.device) -> PlantedDictionary:
    """Where the rows of both come from."""
    return PlantedDictionary(d_in=shape.d_in, n_true=shape.n_true, l0=shape.l0, device=device)


def their_loop(shape: Shape, device: torch.device, epochs: int, most: int | None) -> tuple[float, float, float, int]:
    """FVU, L0, seconds and steps of the loop; `most` steps of it at most."""
    source = PlantedSource(planted(shape, device), batch_size=BATCH, steps=1, rows=shape.rows)
    rows = source.fixed
    assert rows is not None
    rows = rows.float()
    torch.manual_seed(0)
    encoder, decoder = (nn.Linear(*size).to(device) for size in ((shape.d_in, shape.d_sae), (shape.d_sae, shape.d_in)))
    with torch.no_grad():
        nn.init.xavier_uniform_(encoder.weight)
        decoder.weight.copy_(nn.functional.normalize(encoder.weight.T, dim=0))
        for layer in (encoder, decoder):
            layer.bias.zero_()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LR)
    began, steps = time.perf_counter(), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), device=device).split(BATCH):
            x = rows[batch]
            code = torch.relu(encoder(x))
            loss = nn.functional.mse_loss(decoder(code), x) + L1 * code.abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                decoder.weight.copy_(nn.functional.normalize(decoder.weight, dim=0))
            steps += 1
            if steps == most:
                break
        if steps == most:
            break
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    held_out = source.planted.held_out(HELD_OUT).x
    with torch.no_grad():
        code = torch.relu(encoder(held_out))
        fvu = unexplained(decoder(code), held_out)
    return fvu, float((code > 0).sum(1).float().mean()), seconds, steps


def unexplained(found: Tensor, rows: Tensor) -> float:
    """FVU about the rows' own mean."""
    return float((found - rows).double().pow(2).sum() / (rows - rows.mean(0)).double().pow(2).sum())


def ours(shape: Shape, config: SaeConfig, device: torch.device, epochs: int, *, small: bool) -> str:
    """Harvest a random phi-2, then train on the planted rows; what came of it, in one line."""
    from midiscover.config import HarvestConfig
    from midiscover.packing import Windows
    from midiscover.reading import Reader
    from tests.bench.gpu_phi2 import RandomCorpus, model

    began = time.perf_counter()
    lm, of_model = model(small, device)
    hook = "model.layers.16.mlp.fc2"
    reader = Reader(lm, {hook: of_model.hidden_size}, HarvestConfig(hooks=(hook,)), shape.tokens)  # type: ignore[arg-type]
    corpus = RandomCorpus(shape.texts, shape.tokens, of_model.vocab_size)
    for start in range(0, shape.texts, 64):
        reader.read(Windows(*corpus.windows(start, start + 64)), [hook])
    if device.type == "cuda":
        torch.cuda.synchronize()
    harvest = time.perf_counter() - began
    steps = epochs * (shape.rows // shape.batch_size)
    began = time.perf_counter()
    source = PlantedSource(planted(shape, device), batch_size=shape.batch_size, steps=steps, rows=shape.rows)
    if device.type == "cuda":
        torch.cuda.synchronize()
    invented = time.perf_counter() - began
    settings = TrainConfig(
        batch_size=shape.batch_size,
        epochs=epochs,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        report_every=steps,
        checkpoint_every=1e9,
    )
    member = Member(id="ours", config=config, train=settings, d_sae=shape.d_sae)
    began = time.perf_counter()
    (trained,) = train([member], source, Nobody(device))
    assert isinstance(trained, Trained), "it did not diverge"
    training = time.perf_counter() - began
    began = time.perf_counter()
    rows, sae = source.planted.held_out(HELD_OUT).x, folded(trained).to(device)
    with torch.no_grad():
        code = sae.encode(rows)
        fvu, l0 = unexplained(sae.decode(code), rows), float((code > 0).sum(1).float().mean())
    return f"{fvu} {l0} {harvest} {training} {steps} {invented + time.perf_counter() - began}"


def cold_start(setting: str, value: float, epochs: int, *, small: bool) -> tuple[float, list[float]]:
    """Seconds of a process of its own, less those in which it invents rows and judges; and what `ours` says there."""
    flags = [*(["--small"] if small else []), "--ours", "--epochs", str(epochs), f"--{setting}", f"{value:g}"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu_seed", *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(done.stderr.strip().splitlines()[-1])
    *said, apart = (float(word) for word in done.stdout.split()[-6:])
    return time.perf_counter() - began - apart, said


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy shape, for a CPU")
    parser.add_argument("--epochs", type=int, default=4, help="of ours")
    parser.add_argument("--l1", type=float, nargs="+", default=COEFFICIENTS, help="coefficients of ours, falling")
    parser.add_argument("--k", type=float, nargs="+", help="TopK SAEs instead, with so many features a token")
    parser.add_argument("--most", type=int, help="steps of that loop at most, of its 48,000")
    parser.add_argument(
        "--reach",
        type=float,
        help="the FVU that a run of that loop has reached; it is not run again, but for --most steps to tell its pace",
    )
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.small else "cpu")
    shape = SMALL if args.small else LARGE
    setting, values = ("k", args.k) if args.k else ("l1", args.l1)
    if args.ours:
        print(ours(shape, sae_of(setting, values[0]), device, args.epochs, small=args.small))
        return 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    table = Table(
        "", "s", "steps", "FVU", "L0", title=f"{name}: {shape.rows:,} rows, {shape.d_in:,} -> {shape.d_sae:,} features"
    )
    theirs = _to_reach(table, shape, device, args)
    tries = 0.0
    for value in values:
        named = f"ours, {setting} {value:g}"
        try:
            cold, (fvu, l0, harvest, training, steps) = cold_start(setting, value, args.epochs, small=args.small)
        except Failed as error:
            print(f"{named}: failed: {error}", flush=True)
            table.add_row(f"{named}, failed")
            continue
        tries += cold
        told = "reached" if fvu <= theirs else "not reached"
        print(f"{named}: {cold:.1f} s, FVU {fvu:.4f}, L0 {l0:.0f}, {told}", flush=True)
        numbers = (f"{cold:.1f}", f"{steps:,.0f}", f"{fvu:.4f}", f"{l0:.0f}")
        table.add_row(f"{named}, from a cold start, {told}", *numbers)
        table.add_row("  of it the model", f"{harvest:.1f}")
        table.add_row("  of it training", f"{training:.1f}")
        if fvu <= theirs:
            break
    if len(values) > 1:
        table.add_row("all tries of ours", f"{tries:.1f}")
    tables.show(table)
    return 0


def _to_reach(table: Table, shape: Shape, device: torch.device, args: argparse.Namespace) -> float:
    """The FVU that is given, or what the loop comes to; and the loop's pace where it runs."""
    if args.reach is not None:
        table.add_row("to reach", "", "", f"{args.reach:.4f}")
        if args.most is None:
            return args.reach
    fvu, l0, seconds, taken = their_loop(shape, device, 3, args.most)
    table.add_row("that loop, its training", f"{seconds:.1f}", f"{taken:,}", f"{fvu:.4f}", f"{l0:.0f}")
    whole = 3 * -(-shape.rows // BATCH)
    if taken < whole:
        table.add_row("  all of it, at that pace", f"{seconds / taken * whole:.0f}", f"{whole:,}")
    print(f"that loop: {taken:,} steps in {seconds:.1f} s, FVU {fvu:.4f}, L0 {l0:.0f}", flush=True)
    return fvu if args.reach is None else args.reach


if __name__ == "__main__":
    sys.exit(main())
