"""The metrics once more, from the weights and the stored held-out activations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from midiscover.cards import default_device
from midiscover.errors import MiDiscoverError
from midiscover.evaluate import reconstruction_metrics
from midiscover.origin import run_config
from midiscover.publish.checks import RECORD, Failed, Skipped, Subject, check, expect
from midiscover.publish.checks_weights import module, tensors
from midiscover.sae.metrics import MetricSums
from midiscover.source import iterate_pairs
from midiscover.store.blocks import read_manifest
from midiscover.store.loader import iterate_rows
from midiscover.store.manifest import HookManifest
from midiscover.train import Pair

SAE = ("sae",)
TOLERANCE = 1e-3
"""Relative. The rows are the same; float32 sums of other threads and devices differ in the sixth digit."""
ROWS_PER_BATCH = 4096
MOST_FLOPS = 1e13
"""Of one pass over the held-out rows: minutes on two CPU cores. More is left out where there is no GPU."""


class _Again:
    """What one pass found."""

    def __init__(self, sums: MetricSums) -> None:
        self.log_sparsity = sums.log_sparsity()
        self.metrics = sums.result()


def _again(subject: Subject) -> _Again:
    return subject.part("measured again", lambda: _measure(subject))


def _measure(subject: Subject) -> _Again:
    record, store = subject.json(RECORD), subject.store
    if store is None:
        raise Skipped("the folder is in no store, so its held-out activations are not known")
    harvest, hook = (record.get("lineage") or {}).get("harvest"), record.get("hook")
    output = record.get("output_hook") or hook
    if not isinstance(harvest, str) or not isinstance(hook, str) or not isinstance(output, str):
        raise Skipped("the record names no harvest and hook")
    sae = module(subject)
    try:
        inputs, outputs = (read_manifest(store, harvest, name) for name in (hook, output))
        if inputs is None or outputs is None:
            raise Skipped(f"the held-out activations of {hook} are not in the store")
        limit = run_config(record).evaluate.max_tokens
        rows = min(limit, inputs.usable["held_out"])
        if 4 * rows * sae.W_enc.numel() > MOST_FLOPS and not torch.cuda.is_available():
            raise Skipped(f"{rows:,} rows through {sae.d_sae:,} features take long without a GPU")
        sae = sae.to(default_device())
        found = reconstruction_metrics({"": sae}, _rows(subject, inputs, outputs, limit), torch.tensor(outputs.mean))
    except MiDiscoverError as error:  # of the blocks, which are no part of the SAE
        raise Skipped(str(error)) from None
    return _Again(found[""])


def _rows(
    subject: Subject, inputs: HookManifest, outputs: HookManifest, limit: int
) -> Iterable[Tensor] | Iterable[Pair]:
    assert subject.store is not None
    if inputs.hook == outputs.hook:
        return iterate_rows(subject.store, inputs, "held_out", ROWS_PER_BATCH, limit)
    return iterate_pairs(subject.store, inputs, outputs, "held_out", ROWS_PER_BATCH, limit)


def _compare(subject: Subject, name: str) -> str:
    metrics = subject.json(RECORD).get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    recorded = metrics.get(name)
    if not isinstance(recorded, int | float):
        raise Skipped(f"the record has no {name}")
    found = _again(subject).metrics
    if found["tokens"] != metrics.get("tokens"):
        raise Failed(f"{found['tokens']} rows are in the store, and {metrics.get('tokens')} were measured")
    value = found[name]
    expect(abs(value - recorded) <= TOLERANCE * abs(recorded) + 1e-9, f"{name} is {value:.6g}, recorded {recorded:.6g}")
    return f"{value:.6g}"


@check("measured again", SAE)
def l0_is_measured_again(subject: Subject) -> str:
    """L0 on the same held-out rows is the recorded one, to 0.1 %."""
    return _compare(subject, "l0")


@check("measured again", SAE)
def fvu_is_measured_again(subject: Subject) -> str:
    """FVU on the same held-out rows is the recorded one, to 0.1 %."""
    return _compare(subject, "fvu")


@check("measured again", SAE)
def cosine_is_measured_again(subject: Subject) -> str:
    """Cosine on the same held-out rows is the recorded one, to 0.1 %."""
    return _compare(subject, "cosine")


@check("measured again", SAE)
def firing_rates_are_measured_again(subject: Subject) -> str:
    """Features fire as often as sparsity.safetensors says."""
    stored = tensors(subject, "sparsity.safetensors").get("sparsity")
    again = _again(subject).log_sparsity
    if stored is None or stored.shape != again.shape:
        raise Skipped("there is no sparsity of these features")
    tokens = _again(subject).metrics["tokens"]
    apart = float((10 ** stored.double() - 10 ** again.double()).abs().max()) * tokens
    # A pre-activation within rounding of its threshold may fall on either side.
    expect(apart < max(2.0, TOLERANCE * tokens), f"a feature fires {apart:.0f} times more or less, of {tokens} tokens")
    return f"of {tokens:,} tokens"
