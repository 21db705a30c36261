"""Every architecture against the formulas it states, in float64, and under folding; new ones are picked up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from midiscover.config import StandardConfig, TopKConfig
from midiscover.errors import UserError
from midiscover.sae.base import Sae, StepContext, l1_conventions
from midiscover.sae.registry import ARCHITECTURES, make_sae

D_IN, D_SAE, TOKENS = 12, 40, 64
CONFIGS = {"standard": StandardConfig(l1_coefficient=0.7), "topk": TopKConfig(k=5, auxk_coefficient=0.3, k_aux=4)}
NO_DEAD = StepContext(l1_scale=1.0, dead=None)


@pytest.fixture(params=sorted(ARCHITECTURES))
def sae(request: pytest.FixtureRequest) -> Sae:
    made = make_sae(CONFIGS[request.param], D_IN, D_SAE).double()
    made.initialise_(seed=3)
    made.after_step()  # constraints hold to the last bit of float64, not only to that of the float32 initialisation
    with torch.no_grad():
        made.b_enc.copy_(torch.linspace(-0.2, 0.3, D_SAE))
        made.b_dec.copy_(torch.linspace(-1, 1, D_IN))
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_every_architecture_has_a_config_here() -> None:
    assert sorted(CONFIGS) == sorted(ARCHITECTURES)


def test_forward_is_decode_of_encode(sae: Sae, x: Tensor) -> None:
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))
    assert (sae.encode(x) >= 0).all()


def test_initialisation_is_the_same_for_the_same_seed(sae: Sae) -> None:
    again = make_sae(sae.config, D_IN, D_SAE)
    again.initialise_(seed=3)
    other = make_sae(sae.config, D_IN, D_SAE)
    other.initialise_(seed=4)
    assert torch.allclose(again.W_dec.double(), sae.W_dec)
    assert not torch.equal(again.W_dec, other.W_dec)
    assert torch.allclose(again.W_dec.norm(dim=1), torch.full((D_SAE,), again.init_norm))
    assert torch.equal(again.W_enc, again.W_dec.T)


def test_folding_takes_raw_activations_and_gives_unit_rows(sae: Sae, x: Tensor) -> None:
    """The folded SAE on raw x equals: normalise, run the trained SAE, undo the normalisation."""
    mean, scale = torch.linspace(2, 3, D_IN, dtype=torch.float64), 0.37
    raw = x * 4 + 2
    normalised = scale * (raw - mean)
    folded = make_sae(sae.config, D_IN, D_SAE)
    folded.load_state_dict(sae.fold(mean, scale))
    expected = sae(normalised) / scale + mean
    assert torch.allclose(folded.double()(raw), expected, atol=1e-5)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(D_SAE).double(), atol=1e-6)
    trained, raw_features = sae.encode(normalised), folded.encode(raw)
    assert torch.equal(trained > 0, raw_features > 0)
    assert torch.allclose(raw_features, trained * sae.W_dec.norm(dim=1) / scale, atol=1e-4)


def test_gradients_equal_those_of_the_naive_formula(sae: Sae, x: Tensor) -> None:
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:9] = True
    context = StepContext(l1_scale=0.5, dead=dead if sae.uses_dead else None)
    sae.loss(x, context).total.backward()
    expected = torch.autograd.grad(NAIVE[sae.kind](sae, x, context), list(sae.parameters()))
    for parameter, gradient in zip(sae.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, atol=1e-9)


def _naive_standard(sae: Sae, x: Tensor, context: StepContext) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in x:
        f = torch.clamp(sae.W_enc.T @ (row - sae.b_dec) + sae.b_enc, min=0)
        x_hat = sae.W_dec.T @ f + sae.b_dec
        l1 = sum(f[i] * sae.W_dec[i].pow(2).sum().sqrt() for i in range(D_SAE))
        total = total + ((x_hat - row) ** 2).sum() + 0.7 * context.l1_scale * l1
    return total / len(x)


def _naive_topk(sae: Sae, x: Tensor, context: StepContext) -> Tensor:
    assert context.dead is not None
    errors, aux, residuals = [], [], []
    for row in x:
        pre = sae.W_enc.T @ (row - sae.b_dec) + sae.b_enc
        x_hat = sae.b_dec.clone()
        for i in sorted(range(D_SAE), key=lambda i: -pre[i].item())[:5]:
            x_hat = x_hat + torch.clamp(pre[i], min=0) * sae.W_dec[i]
        errors.append(((x_hat - row) ** 2).sum())
        residual = (row - x_hat).detach()
        guess = torch.zeros(D_IN, dtype=torch.float64)
        for i in sorted((i for i in range(D_SAE) if context.dead[i]), key=lambda i: -pre[i].item())[:4]:
            guess = guess + torch.clamp(pre[i], min=0) * sae.W_dec[i]
        aux.append(((guess - residual) ** 2).sum())
        residuals.append(residual)
    stacked = torch.stack(residuals)
    variance = ((stacked - stacked.mean(0)) ** 2).sum(1).mean()
    return torch.stack(errors).mean() + 0.3 * torch.stack(aux).mean() / variance


NAIVE = {"standard": _naive_standard, "topk": _naive_topk}


def test_topk_keeps_at_most_k_of_the_largest(x: Tensor) -> None:
    sae = make_sae(TopKConfig(k=5), D_IN, D_SAE).double()
    sae.initialise_(0)
    features, pre = sae.encode(x).detach(), sae.pre_activations(x).detach()
    assert int((features > 0).sum(1).max()) <= 5
    for row, before in zip(features, pre, strict=True):
        threshold = sorted(before.tolist())[-5]
        assert all(float(before[i]) >= threshold for i in row.nonzero().flatten())


def test_topk_rows_keep_unit_norm_and_gradients_lie_in_the_tangent(x: Tensor) -> None:
    sae = make_sae(TopKConfig(k=5), D_IN, D_SAE).double()
    sae.initialise_(0)
    sae.after_step()
    sae.loss(x, NO_DEAD).total.backward()
    sae.before_step()
    assert sae.W_dec.grad is not None
    assert torch.allclose((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(D_SAE).double(), atol=1e-12)
    with torch.no_grad():
        sae.W_dec -= 0.1 * sae.W_dec.grad
    sae.after_step()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())


def test_an_unknown_architecture_is_an_error_and_never_a_relu() -> None:
    class Foreign:
        kind = "gated_v9"

    with pytest.raises(UserError, match="gated_v9.*known are"):
        make_sae(Foreign(), 4, 8)


def test_l1_conventions_describe_one_and_the_same_objective(x: Tensor) -> None:
    """Each convention's loss, written out on its own scale, is the same function up to a constant factor."""
    scale = 0.8
    sae = make_sae(StandardConfig(l1_coefficient=3.0), D_IN, D_SAE).double()
    sae.initialise_(5)
    found = l1_conventions(3.0, scale=scale, d_in=D_IN, d_sae=D_SAE)
    ours = sae.loss(x, NO_DEAD).total
    error, f = sae(x) - x, sae.encode(x) * sae.W_dec.norm(dim=1)
    raw_error, raw_f = error / scale, f / scale
    raw = (raw_error**2).sum(1).mean() + found["raw_scale"] * raw_f.sum(1).mean()
    seed = (raw_error**2).mean() + found["seed"] * raw_f.mean()
    unit_error, unit_f = error / D_IN**0.5, f / D_IN**0.5
    unit = (unit_error**2).sum(1).mean() + found["unit_norm"] * unit_f.sum(1).mean()
    assert torch.allclose(raw * scale**2, ours)
    assert torch.allclose(seed * D_IN * scale**2, ours)
    assert torch.allclose(unit * D_IN, ours)
