"""The tensors of an SAE, and the firing rates beside them."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from midiscover.publish.checks import CFG, RECORD, SPARSITY, WEIGHTS, Failed, Skipped, Subject, check, fail_for, whole
from midiscover.publish.importers import IMPORTED
from midiscover.sae.base import Sae
from midiscover.sae.registry import FOLDED, folded_sae

NORM_TOLERANCE = 1e-5
"""Of float32 rows that were divided by their norm in float64: a few units in the seventh digit."""
NEVER = -10.0
"""log10(0 + 1e-10), the rate of a feature that never fired."""


def tensors(subject: Subject, name: str = WEIGHTS) -> dict[str, Tensor]:
    """What a safetensors file holds."""
    return subject.part(name, lambda: _load(name, subject.read(name)))


def shapes(subject: Subject) -> dict[str, tuple[int, ...]]:
    """Name -> shape, as the architecture and widths of cfg.json have them."""
    cfg = subject.json(CFG)
    architecture = cfg.get("architecture")
    if architecture not in FOLDED:
        raise Skipped("the architecture is not known")
    cls = FOLDED[architecture]
    d_in, d_sae = whole(cfg, "d_in"), whole(cfg, "d_sae")
    d_out = whole(cfg, "d_out") if cls.transcodes else d_in
    with torch.device("meta"):
        sae = cls(cls.config_of(cfg | {"k": cfg.get("k") or 1}), d_in, d_sae, d_out)
    return {name: tuple(value.shape) for name, value in sae.state_dict().items()}


def fitting(subject: Subject) -> dict[str, Tensor]:
    """The tensors, where names and shapes are right; Skipped where not."""
    found, wanted = tensors(subject), shapes(subject)
    if {name: tuple(value.shape) for name, value in found.items()} != wanted:
        raise Skipped("names or shapes of the tensors are wrong")
    return found


def module(subject: Subject) -> Sae:
    """The SAE itself; Skipped where cfg.json and tensors do not make one."""

    def make() -> Sae:
        try:
            return folded_sae(subject.json(CFG), fitting(subject)).eval().requires_grad_(False)
        except (ValueError, TypeError, RuntimeError) as error:
            raise Failed(str(error)) from None

    return subject.part("the SAE", make)


@check("weights")
def weights_can_be_read(subject: Subject) -> str:
    """The file is whole: its header describes all of its bytes."""
    found = subject.require(WEIGHTS, lambda: _load(WEIGHTS, subject.read(WEIGHTS)))
    return f"{sum(value.numel() for value in found.values()):,} numbers"


@check("weights")
def tensors_are_those_of_the_architecture(subject: Subject) -> str:
    """The tensors are those of the architecture, no more and no fewer."""
    found, wanted = tensors(subject), shapes(subject)
    fail_for(
        [f"{name} is missing" for name in wanted if name not in found]
        + [f"{name} is not one of {subject.json(CFG)['architecture']}'s" for name in found if name not in wanted]
    )
    return ", ".join(wanted)


@check("weights")
def shapes_fit(subject: Subject) -> None:
    """Each tensor has the shape that d_in and d_sae give it."""
    found, wanted = tensors(subject), shapes(subject)
    fail_for(
        [
            f"{name} is {list(found[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name].shape) != shape
        ]
    )


@check("weights")
def tensors_are_float32(subject: Subject) -> None:
    """Each tensor is float32."""
    fail_for(
        [
            f"{name} is {str(value.dtype).removeprefix('torch.')}"
            for name, value in tensors(subject).items()
            if value.dtype != torch.float32
        ]
    )


@check("weights")
def weights_are_finite(subject: Subject) -> None:
    """Every number is finite."""
    wrong = {name: int((~value.isfinite()).sum()) for name, value in tensors(subject).items()}
    fail_for([f"{count} of {name}" for name, count in wrong.items() if count])


@check("weights")
def decoder_rows_have_norm_1(subject: Subject) -> str:
    """Decoder rows have norm 1."""
    norms = fitting(subject)["W_dec"].double().norm(dim=1)
    norms = norms[norms.isfinite()]  # the others are told above
    wrong = (norms - 1).abs() > NORM_TOLERANCE
    if wrong.any():
        low, high = float(norms.min()), float(norms.max())
        raise Failed(f"{int(wrong.sum())} of {len(norms)} have not; norms go from {low:.6g} to {high:.6g}")
    return f"within {float((norms - 1).abs().max()) if len(norms) else 0.0:.1e}"


@check("weights")
def encoder_columns_are_not_zero(subject: Subject) -> str:
    """No feature's encoder column is zero, except of an SAE that was imported so."""
    zero = (fitting(subject)["W_enc"] == 0).all(dim=0).nonzero().flatten().tolist()
    if zero and _is_imported(subject):
        return f"{len(zero)} are zero, as they came"
    fail_for([f"feature {index}" for index in zero])
    return ""


def _is_imported(subject: Subject) -> bool:
    """Whether the weights are those of another maker, as the record says or, where there is none, cfg.json."""
    if subject.has(RECORD):
        return bool(subject.json(RECORD).get("imported"))
    metadata = subject.json(CFG).get("metadata")
    return isinstance(metadata, dict) and str(metadata.get("midiscover_id")).startswith(IMPORTED)


@check("weights")
def thresholds_are_not_negative(subject: Subject) -> None:
    """Thresholds of a JumpReLU SAE are 0 or above."""
    found = fitting(subject)
    if "threshold" not in found:
        raise Skipped("the architecture has none")
    fail_for([f"feature {i}: {float(found['threshold'][i]):g}" for i in (found["threshold"] < 0).nonzero().flatten()])


@check("sparsity")
def sparsity_can_be_read(subject: Subject) -> None:
    """sparsity.safetensors is whole and holds the tensor `sparsity`."""
    found = subject.require(SPARSITY, lambda: _load(SPARSITY, subject.read(SPARSITY)))
    if list(found) != ["sparsity"]:
        raise Failed(f"it holds {', '.join(found) or 'nothing'}")


@check("sparsity")
def sparsity_is_one_a_feature(subject: Subject) -> None:
    """It is float32 of one entry a feature."""
    found, d_sae = _sparsity(subject), whole(subject.json(CFG), "d_sae")
    if found.shape != (d_sae,) or found.dtype != torch.float32:
        raise Failed(f"it is {str(found.dtype).removeprefix('torch.')} {list(found.shape)}, not float32 [{d_sae}]")


@check("sparsity")
def sparsity_is_in_range(subject: Subject) -> None:
    """Each entry is log10(firing rate + 1e-10), so from -10 to 0."""
    found = _sparsity(subject).double()
    wrong = ~((found >= NEVER - 1e-5) & (found <= 1e-6))  # NaN is neither
    fail_for([f"feature {i}: {float(found[i]):g}" for i in wrong.nonzero().flatten().tolist()])


@check("sparsity", ("sae", "bundle"))
def sparsity_agrees_with_the_record(subject: Subject) -> str:
    """As many features never fired as record.json says, and they fire as often as its L0."""
    log_rate, metrics = _sparsity(subject).double(), subject.json(RECORD).get("metrics")
    if not isinstance(metrics, dict) or not all(isinstance(metrics.get(name), float) for name in ("dead_share", "l0")):
        raise Skipped("record.json has no dead_share and l0")
    dead, told = int((log_rate < NEVER + 0.5).sum()), round(metrics["dead_share"] * len(log_rate))
    l0 = float((10**log_rate - 1e-10).sum())
    if dead != told or abs(l0 - metrics["l0"]) > 1e-3 * max(1.0, l0):
        raise Failed(f"{dead} never fired and L0 is {l0:.4g}; the record has {told} and {metrics['l0']:.4g}")
    return f"{dead} never fired"


def _sparsity(subject: Subject) -> Tensor:
    found = tensors(subject, SPARSITY)
    if "sparsity" not in found:
        raise Skipped("there is no tensor `sparsity`")
    return found["sparsity"]


def _load(name: str, data: bytes) -> dict[str, Any]:
    try:
        return load(data)
    except SafetensorError as error:
        raise Failed(f"{name} can't be read: {error}") from None
