"""How fast a device does what a run consists of: measured by `midiscover calibrate`, or reckoned from a data sheet.

Standard library only. Measured rates lie in the store, one file for each kind of device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from midiscover.errors import ConfigError, NotFoundError
from midiscover.saeconfig import SAE_KINDS
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.storage import Storage

VERSION = 2


class StepCost(NamedTuple):
    """Seconds of a training step by what they grow with. A row is d_in + d_out numbers: one of W_enc, one of W_dec."""

    weight: float
    """For each weight: the optimizer, norms, clip."""
    token: float
    """For each weight and token: dense products."""
    active: float = 0.0
    """For each number of the rows of a token's active features, where products are sparse."""

    def seconds(self, *, rows: int, d_sae: int, tokens: int, l0: float) -> float:
        """Of one step; rows: d_in + d_out."""
        return rows * (self.weight * d_sae + tokens * (self.token * d_sae + self.active * l0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Of one device."""

    device: str
    """`CPU`, or the name of a GPU."""
    measured: str | None
    """When; None: reckoned from a data sheet, with shares that are stated where they are used."""
    threads: int = 1
    model_dtype: str
    """`model.dtype` with which the language model's rates hold."""
    train_dtype: str
    """`train.dtype` with which those of steps hold. SAEs are evaluated in float32 whatever it is."""
    model_flops: float
    """FLOP/s of a language model's forward pass, as a harvest runs it."""
    logits_flops: float
    """The same of a pass to the end, with a reconstruction spliced in and cross-entropy measured."""
    load_bytes: float
    """Bytes/s in which a model's weights come from this machine's disk to its place."""
    tokenise: float
    """Tokens/s in which a corpus is made."""
    steps: Mapping[str, StepCost]
    """By kind of SAE."""
    encode: float
    """Seconds for each weight and token when an SAE is evaluated."""
    write: float
    """Bytes/s to the store, of one worker."""
    read: float
    starts: Mapping[str, float]
    """Seconds until something works: driver, ray, worker, trial, figures."""
    memory: float | None = None
    """Bytes of a GPU."""
    instead_of: str | None = None
    """Key of measured rates in the store which are of another version, so that these are reckoned from a data sheet."""

    def tree(self) -> dict[str, Any]:
        """As JSON has it: costs by their names."""
        return asdict(self) | {"steps": {kind: cost._asdict() for kind, cost in self.steps.items()}}

    def step(self, kind: str) -> StepCost:
        """Of a kind of SAE. ConfigError where these rates know none."""
        if kind not in self.steps:
            raise ConfigError(
                f"The rates of {self.device} know no sae.kind {kind}; they were measured by an older miDiscover. "
                "`midiscover calibrate` measures them anew."
            )
        return self.steps[kind]


class Sheet(NamedTuple):
    """What a maker says of a GPU."""

    name: str
    flops: float
    """bfloat16, dense, per second."""
    plain: float
    """float32 without tensor cores, per second: as PyTorch multiplies unless it is told otherwise."""
    bandwidth: float
    """Bytes/s of its memory."""
    memory: float


SHEETS = {
    "h200": Sheet("NVIDIA H200", 989e12, 67e12, 4.8e12, 141e9),
    "h100": Sheet("NVIDIA H100 SXM", 989e12, 67e12, 3.35e12, 80e9),
    "a100": Sheet("NVIDIA A100 80GB SXM", 312e12, 19.5e12, 2.04e12, 80e9),
    "a100-40g": Sheet("NVIDIA A100 40GB SXM", 312e12, 19.5e12, 1.555e12, 40e9),
    "l40s": Sheet("NVIDIA L40S", 362e12, 91.6e12, 0.864e12, 48e9),
    "l4": Sheet("NVIDIA L4", 121e12, 30.3e12, 0.3e12, 24e9),
    "a10": Sheet("NVIDIA A10", 125e12, 31.2e12, 0.6e12, 24e9),
    "a10g": Sheet("NVIDIA A10G", 70e12, 31.5e12, 0.6e12, 24e9),
}
MODEL_SHARE, STEP_SHARE = 0.45, 0.65
"""Of a sheet's FLOP/s: what a harvest and the products of an SAE's step are taken to reach. An H200 reached 0.40, or
0.52 compiled, and 0.71 (tests/bench/RESULTS.md)."""
BANDWIDTH_SHARE = 0.9
STEP_BYTES = 33
"""Of memory traffic for each weight and step: Adam with its moments, the gradient and the copy in bfloat16."""
CODE_BYTES = {"bfloat16": 20, "float32": 40}
"""Of memory traffic for each feature and token."""
ROW = 2048
"""d_in + d_out by which a code's traffic is shared out over the weights; smaller ones wait longer than is reckoned."""
SINK = 1e9
"""Bytes/s of a store, to or from one worker."""
STARTS = {"driver": 8.0, "ray": 2.0, "worker": 10.0, "trial": 12.0, "figures": 5.0}
"""Seconds; those of a cluster that stands."""


def of_sheet(name: str, model_dtype: str, train_dtype: str) -> Rates:
    """Rates reckoned from a data sheet, for a run's `model.dtype` and `train.dtype`. ConfigError for an unknown GPU."""
    sheet = find_sheet(name)
    if sheet is None:
        raise ConfigError(f"--gpu {name} is not known; known are {', '.join(SHEETS)}, and what the store has rates of.")
    peaks = {"bfloat16": sheet.flops, "float32": sheet.plain}
    bandwidth, model_flops = BANDWIDTH_SHARE * sheet.bandwidth, MODEL_SHARE * peaks[model_dtype]
    # A step makes five products of 2 FLOPs for each of the weights of one matrix: 5 for each weight of both.
    token = 5 / (STEP_SHARE * peaks[train_dtype]) + CODE_BYTES[train_dtype] / ROW / bandwidth
    step = StepCost(weight=STEP_BYTES / bandwidth, token=token)
    return Rates(
        device=sheet.name,
        measured=None,
        model_dtype=model_dtype,
        train_dtype=train_dtype,
        model_flops=model_flops,
        logits_flops=model_flops,
        load_bytes=SINK,
        tokenise=400_000,
        steps=dict.fromkeys(SAE_KINDS, step),
        encode=2 / (STEP_SHARE * sheet.plain),
        write=SINK,
        read=SINK,
        starts=STARTS,
        memory=sheet.memory,
    )


def find_sheet(device: str) -> Sheet | None:
    """The data sheet of a GPU by its key or its name, in any spelling: A100-80G and NVIDIA A100-SXM4-80GB are a100.

    A word that is neither of the sheet nor the size of its memory makes another GPU, such as a PCIe card.
    """
    words = {word for word in _words(device) if not word.startswith("hbm")}
    for key, sheet in SHEETS.items():
        if _words(key) <= words <= _words(sheet.name) | {f"{sheet.memory / 1e9:.0f}g"}:
            return sheet
    return None


def write_rates(storage: Storage, rates: Rates) -> str:
    """Keep measured rates in the place of older ones of that device; returns their key."""
    key = layout.rates(slug(rates.device))
    storage.write(key, dump({"v": VERSION} | rates.tree()))
    return key


def read_rates(storage: Storage, device: str) -> Rates:
    """Measured rates of the one device that is called `device`, or whose name has its words: `h200` is NVIDIA H200.

    NotFoundError where there are none, ConfigError where several devices are called so, or where the rates are of
    another version of miDiscover.
    """
    key = _find(storage, device)
    tree = json.loads(storage.read(key))
    if tree.pop("v", None) != VERSION:
        raise ConfigError(f"{key} is of another version of miDiscover; `midiscover calibrate` measures it anew.")
    steps = {kind: StepCost(**cost) for kind, cost in tree.pop("steps").items()}
    return Rates(**tree, steps=steps)


def _find(storage: Storage, device: str) -> str:
    """The key of a device's rates. NotFoundError where there are none, ConfigError where several are called so."""
    known = {key.rpartition("/")[2].removesuffix(".json"): key for key in storage.list(layout.RATES)}
    wanted = slug(device)
    # Whole words: a10 is no a100, and l4 no l40s.
    fits = [wanted] if wanted in known else sorted(name for name in known if _words(wanted) <= _words(name))
    if len(fits) > 1:
        raise ConfigError(
            f"The store {storage.uri} has rates of several devices called {device}: {', '.join(fits)}; name one of "
            "them with --gpu."
        )
    if not fits:
        have = f"it has those of {', '.join(sorted(known))}" if known else "it has none"
        raise NotFoundError(
            f"The store {storage.uri} has no rates of {device}; {have}. `midiscover calibrate` "
            "measures those of this machine in about a minute."
        )
    return known[fits[0]]


def known_rates(storage: Storage | None, device: str, model_dtype: str, train_dtype: str) -> Rates:
    """Those of a device that the store has, in whatever precision they were measured, else those of its data sheet,
    as where the store's are of another version of miDiscover.

    ConfigError where there is none either, or where `device` is the name of several.
    """
    older = None
    if storage is not None:
        try:
            key = _find(storage, device)
        except NotFoundError:
            pass
        else:
            is_ours = json.loads(storage.read(key)).get("v") == VERSION
            if is_ours or find_sheet(device) is None:
                return read_rates(storage, device)
            older = key
    return replace(of_sheet(device, model_dtype, train_dtype), instead_of=older)


def slug(device: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.casefold()).strip("-")


def _words(device: str) -> set[str]:
    """Those of a device's name, with units as Ray writes them: 80GB is 80g, SXM4 is sxm."""
    return {re.sub(r"^(\d+g)b$|^(sxm)\d$", r"\1\2", word) for word in slug(device).split("-")}
