"""Every architecture's loss as plain loops over tokens and features, and the settings with which it is tested.

A new architecture gets a line in `CONFIGS` and a function in `NAIVE`; the shared tests then run on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from midiscover.sae.base import Dead, Sae, StepContext
from midiscover.sae.registry import make_sae
from midiscover.saeconfig import (
    BatchTopKConfig,
    GatedConfig,
    JumpReluConfig,
    MatryoshkaConfig,
    SaeConfig,
    SkipTranscoderConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
)

D_IN, D_OUT, D_SAE, TOKENS = 12, 7, 40, 24
"""D_OUT: of transcoders; of all others it is D_IN."""

CONFIGS: dict[str, SaeConfig] = {
    "standard": StandardConfig(l1_coefficient=0.7),
    "gated": GatedConfig(l1_coefficient=0.7),
    "topk": TopKConfig(k=5, auxk_coefficient=0.3, k_aux=4),
    "batchtopk": BatchTopKConfig(k=5, auxk_coefficient=0.3, k_aux=4),
    "jumprelu": JumpReluConfig(l0_coefficient=0.7, bandwidth=0.4),
    "matryoshka_batchtopk": MatryoshkaConfig(k=5, auxk_coefficient=0.3, k_aux=4, prefixes=(0.1, 0.3, 1.0)),
    "transcoder": TranscoderConfig(l1_coefficient=0.7),
    "skip_transcoder": SkipTranscoderConfig(l1_coefficient=0.7),
}


def make(config: SaeConfig, seed: int = 3) -> Sae:
    """An initialised SAE in float32."""
    sae = make_sae(config, D_IN, D_SAE)
    if sae.transcodes:
        sae = make_sae(config, D_IN, D_SAE, D_OUT)
    sae.initialise_(seed)
    return sae


def make_used(config: SaeConfig) -> Sae:
    """An SAE in float64 as a training might have left it: no parameter is 0, every constraint holds."""
    sae = make(config).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.W_enc.div_(sae.encoder_norm)
        for name, parameter in sae.named_parameters():
            if name not in ("W_enc", "W_dec"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise)
    sae.after_step()
    sae.calibrate_(rows(8, D_IN))
    return sae


def rows(seed: int, width: int, count: int = TOKENS) -> Tensor:
    """[count, width] float64 normal numbers."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(sae: Sae) -> tuple[Tensor, Tensor]:
    """x and y of a training batch; the same but for transcoders."""
    x = rows(1, D_IN)
    return x, rows(2, sae.d_out) if sae.transcodes else x


def some_dead() -> Tensor:
    """[D_SAE] bool."""
    return torch.arange(D_SAE) % 4 == 0


def dead_of(mask: Tensor, *, spare: int = 0) -> Dead:
    """With room for so many more than there are."""
    return Dead(mask, int(mask.sum()) + spare)


Formula = Callable[[Sae, Tensor, Tensor, StepContext], Tensor]


def _pre(sae: Sae, row: Tensor, *, centre: bool = True, bias: bool = True) -> list[Tensor]:
    z = row - sae.b_dec if centre else row
    return [z @ sae.W_enc[:, i] + (sae.b_enc[i] if bias else 0) for i in range(D_SAE)]


def _decode(sae: Sae, code: dict[int, Tensor]) -> Tensor:
    y_hat = sae.b_dec.clone()
    for i, value in code.items():
        y_hat = y_hat + value * sae.W_dec[i]
    return y_hat


def _positive(values: Iterable[Tensor]) -> dict[int, Tensor]:
    return {i: value for i, value in enumerate(values) if value > 0}


def _error(y_hat: Tensor, row: Tensor) -> Tensor:
    return ((y_hat - row) ** 2).sum()


def _norm(row: Tensor) -> Tensor:
    return (row**2).sum() ** 0.5


def _mean(values: list[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / len(values)


def standard(sae: Sae, x: Tensor, y: Tensor, context: StepContext) -> Tensor:
    """Squared error and the L1 norm weighted by decoder norms."""
    losses = []
    for row, target in zip(x, y, strict=True):
        code = _positive(_pre(sae, row))
        l1 = sum(value * _norm(sae.W_dec[i]) for i, value in code.items())
        losses.append(_error(_decode(sae, code), target) + context.sparsity * l1)
    return _mean(losses)


def gated(sae: Sae, x: Tensor, y: Tensor, context: StepContext) -> Tensor:
    """Section 3.2 of the paper: the L1 norm and a second reconstruction of the gate, by a decoder that stands still."""
    losses = []
    for row, target in zip(x, y, strict=True):
        shared = _pre(sae, row, bias=False)
        gate = _positive(value + b for value, b in zip(shared, sae.get_parameter("b_gate"), strict=True))
        code, frozen = {}, sae.b_dec.detach()
        for i, value in gate.items():
            magnitude = shared[i] * torch.exp(sae.get_parameter("r_mag")[i]) + sae.get_parameter("b_mag")[i]
            if magnitude > 0:
                code[i] = magnitude
            frozen = frozen + value * sae.W_dec[i].detach()
        l1 = sum(gate.values(), torch.zeros(()))
        losses.append(_error(_decode(sae, code), target) + context.sparsity * l1 + _error(frozen, target))
    return _mean(losses)


def jumprelu(sae: Sae, x: Tensor, y: Tensor, context: StepContext) -> Tensor:
    """Squared error and the number of features, with the paper's pseudo-derivatives written into the values.

    `moved` is 0 and has derivative 1 in the threshold, so that -threshold / bandwidth * moved, within the kernel, is
    the straight-through term of a feature, and -1 / bandwidth * moved that of its count.
    """
    losses, width = [], 0.4
    threshold = sae.get_parameter("threshold")
    for row, target in zip(x, y, strict=True):
        code, count = {}, torch.zeros((), dtype=torch.float64)
        for i, value in enumerate(_pre(sae, row)):
            moved = threshold[i] - threshold[i].detach()
            fires, near = bool(value > threshold[i]), bool(abs(value - threshold[i]) < width / 2)
            code[i] = value * fires - near * threshold[i].detach() / width * moved
            count = count + fires - near / width * moved
        losses.append(_error(_decode(sae, code), target) + context.sparsity * count)
    return _mean(losses)


def topk(sae: Sae, x: Tensor, y: Tensor, context: StepContext) -> Tensor:
    """Squared error of the five largest of each token, and AuxK."""
    pres = [_pre(sae, row) for row in x]
    codes = [_largest(pre, range(D_SAE), 5) for pre in pres]
    guesses = [_decode(sae, code) for code in codes]
    mse = _mean([_error(guess, target) for guess, target in zip(guesses, y, strict=True)])
    return mse + 0.3 * sae.d_out * _auxk(sae, pres, [t - g for t, g in zip(y, guesses, strict=True)], context)


def batchtopk(sae: Sae, x: Tensor, y: Tensor, context: StepContext) -> Tensor:
    """Squared error of the 5 * tokens largest of the batch, and AuxK."""
    pres = [_pre(sae, row) for row in x]
    guesses = [_decode(sae, code) for code in _largest_of_batch(pres)]
    mse = _mean([_error(guess, target) for guess, target in zip(guesses, y, strict=True)])
    return mse + 0.3 * sae.d_out * _auxk(sae, pres, [t - g for t, g in zip(y, guesses, strict=True)], context)


def matryoshka(sae: Sae, x: Tensor, y: Tensor, context: StepContext) -> Tensor:
    """The mean squared error of the first 4, the first 12 and all of BatchTopK's features, and AuxK of the whole."""
    pres = [_pre(sae, row) for row in x]
    codes = _largest_of_batch(pres)
    errors = []
    for size in (4, 12, 40):
        for code, target in zip(codes, y, strict=True):
            errors.append(_error(_decode(sae, {i: value for i, value in code.items() if i < size}), target))
    residuals = [target - _decode(sae, code) for code, target in zip(codes, y, strict=True)]
    return _mean(errors) + 0.3 * sae.d_out * _auxk(sae, pres, residuals, context)


def transcoder(sae: Sae, x: Tensor, y: Tensor, context: StepContext) -> Tensor:
    """As the standard SAE, with another target and nothing subtracted from the input."""
    losses = []
    for row, target in zip(x, y, strict=True):
        code = _positive(_pre(sae, row, centre=False))
        l1 = sum(value * _norm(sae.W_dec[i]) for i, value in code.items())
        y_hat = _decode(sae, code)
        if sae.kind == "skip_transcoder":
            y_hat = torch.stack([value + row @ sae.get_parameter("W_skip")[i] for i, value in enumerate(y_hat)])
        losses.append(_error(y_hat, target) + context.sparsity * l1)
    return _mean(losses)


def _largest(pre: list[Tensor], among: Iterable[int], k: int) -> dict[int, Tensor]:
    kept = sorted(among, key=lambda i: -float(pre[i].detach()))[:k]
    return {i: pre[i] for i in kept if pre[i] > 0}


def _largest_of_batch(pres: list[list[Tensor]]) -> list[dict[int, Tensor]]:
    places = [(token, i) for token in range(len(pres)) for i in range(D_SAE)]
    places.sort(key=lambda place: -float(pres[place[0]][place[1]].detach()))
    codes: list[dict[int, Tensor]] = [{} for _ in pres]
    for token, i in places[: 5 * len(pres)]:
        if pres[token][i] > 0:
            codes[token][i] = pres[token][i]
    return codes


def _auxk(sae: Sae, pres: list[list[Tensor]], residuals: list[Tensor], context: StepContext) -> Tensor:
    """The four strongest dead features on the residual, over its variance (Gao et al. 2024, A.2)."""
    assert context.dead is not None
    dead = [i for i in range(D_SAE) if context.dead.mask[i]]
    residuals = [residual.detach() for residual in residuals]
    mean = sum(residuals, torch.zeros(())) / len(residuals)
    variance = _mean([_error(residual, mean) for residual in residuals])
    errors = []
    for pre, residual in zip(pres, residuals, strict=True):
        guess = torch.zeros(sae.d_out, dtype=torch.float64)
        for i, value in _largest(pre, dead, 4).items():
            guess = guess + value * sae.W_dec[i]
        errors.append(_error(guess, residual))
    return _mean(errors) / variance


NAIVE: dict[str, Formula] = {
    "standard": standard,
    "gated": gated,
    "topk": topk,
    "batchtopk": batchtopk,
    "jumprelu": jumprelu,
    "matryoshka_batchtopk": matryoshka,
    "transcoder": transcoder,
    "skip_transcoder": transcoder,
}
