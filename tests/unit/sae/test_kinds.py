"""What is special to one architecture; what holds for all is in test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from midiscover.errors import ConfigError
from midiscover.sae.base import Normalisation, StepContext, l1_conventions
from midiscover.sae.batchtopk import BatchTopKSae, keep_top_of_batch, largest
from midiscover.sae.code import LOOKED_AT
from midiscover.sae.jumprelu import JumpReluSae
from midiscover.sae.matryoshka import prefix_sizes
from midiscover.sae.registry import folded_sae, make_sae
from midiscover.saeconfig import (
    BatchTopKConfig,
    GatedConfig,
    JumpReluConfig,
    MatryoshkaConfig,
    SkipTranscoderConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
)
from tests.unit.sae.naive import D_IN, D_OUT, D_SAE, batch, dead_of, make, make_used, rows, some_dead
from tests.unit.sae.test_architectures import assert_unit_rows

PLAIN = StepContext(sparsity=1.0, dead=None)


@pytest.fixture
def x() -> Tensor:
    return rows(1, D_IN, 64)


def test_standard_with_unit_norm_has_unit_rows_and_the_plain_l1_norm(x: Tensor) -> None:
    config = StandardConfig(decoder="unit_norm")
    assert_unit_rows(make_used(config))
    sae = make_used(config)
    assert torch.allclose(sae.loss(x, x, PLAIN).sparsity, sae.encode(x).sum(1).mean())
    free = make_used(StandardConfig())
    before = free.W_dec.detach().clone()
    free.loss(x, x, PLAIN).total.backward()
    grad = free.W_dec.grad
    assert grad is not None
    kept = grad.clone()
    free.before_step()
    free.after_step()
    assert torch.equal(grad, kept)
    assert torch.equal(free.W_dec, before)


def test_l1_conventions_describe_one_and_the_same_objective(x: Tensor) -> None:
    """Each convention's loss, written out on its own scale, is the same function up to a constant factor."""
    scale = 0.8
    sae = make(StandardConfig(l1_coefficient=3.0), seed=5).double()
    found = l1_conventions(sae.coefficient, scale=scale, d_in=D_IN, d_sae=D_SAE)
    ours = sae.loss(x, x, StepContext(sparsity=sae.coefficient, dead=None)).total
    error, f = sae(x) - x, sae.encode(x) * sae.W_dec.norm(dim=1)
    raw_error, raw_f = error / scale, f / scale
    raw = (raw_error**2).sum(1).mean() + found["raw_scale"] * raw_f.sum(1).mean()
    seed = (raw_error**2).mean() + found["seed"] * raw_f.mean()
    unit_error, unit_f = error / D_IN**0.5, f / D_IN**0.5
    unit = (unit_error**2).sum(1).mean() + found["unit_norm"] * unit_f.sum(1).mean()
    assert torch.allclose(raw * scale**2, ours)
    assert torch.allclose(seed * D_IN * scale**2, ours)
    assert torch.allclose(unit * D_IN, ours)


def test_coefficients_are_those_of_the_settings() -> None:
    assert make(GatedConfig(l1_coefficient=2.5)).coefficient == 2.5
    assert make(TranscoderConfig(l1_coefficient=2.5)).coefficient == 2.5
    assert make(JumpReluConfig(l0_coefficient=0.5)).coefficient == 0.5
    assert make(TopKConfig()).coefficient == make(MatryoshkaConfig()).coefficient == 0


def test_a_gate_opens_without_shrinking_what_passes(x: Tensor) -> None:
    sae = make_used(GatedConfig())
    with torch.no_grad():
        wide = sae.encode(x)
        sae.get_parameter("b_gate").sub_(0.5)
        narrow = sae.encode(x)
    open_ = narrow > 0
    assert 0 < int(open_.sum()) < int((wide > 0).sum())
    assert torch.equal(narrow[open_], wide[open_])


def test_topk_keeps_at_most_k_of_the_largest(x: Tensor) -> None:
    sae = make(TopKConfig(k=5), seed=0).double()
    features, pre = sae.encode(x).detach(), sae.pre_activations(x).detach()
    assert int((features > 0).sum(1).max()) <= 5
    for row, before in zip(features, pre, strict=True):
        threshold = sorted(before.tolist())[-5]
        assert all(float(before[i]) >= threshold for i in row.nonzero().flatten())


def test_auxk_with_room_for_dead_features_and_none_of_them_is_nothing(x: Tensor) -> None:
    sae = make_used(TopKConfig(k=5, auxk_coefficient=0.3, k_aux=4))
    found = []
    for dead in (None, dead_of(torch.zeros(D_SAE, dtype=torch.bool), spare=7)):
        losses = sae.loss(x, x, StepContext(sparsity=0.0, dead=dead))
        assert losses.sparsity == 0
        found.append(torch.autograd.grad(losses.total, list(sae.parameters())))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_auxk_of_a_single_row_is_nothing(x: Tensor) -> None:
    sae = make_used(TopKConfig(k=5, auxk_coefficient=0.3, k_aux=4))
    context = StepContext(sparsity=0.0, dead=dead_of(torch.ones(D_SAE, dtype=torch.bool)))
    one, many = sae.loss(x[:1], x[:1], context), sae.loss(x, x, context)
    assert float(one.total.detach()) == float(one.mse.detach()) > 0
    assert float(many.total.detach()) > float(many.mse.detach())


@pytest.mark.parametrize("spare", [0, 5])
def test_auxk_of_few_dead_features_uses_them_all_and_no_other(x: Tensor, spare: int) -> None:
    sae = make_used(TopKConfig(k=5, auxk_coefficient=0.3, k_aux=4))
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 17]] = True
    sae.loss(x, x, StepContext(sparsity=0.0, dead=dead_of(dead, spare=spare))).total.backward()
    both = sae.W_dec.grad
    assert both is not None
    sae.zero_grad()
    losses = sae.loss(x, x, PLAIN)
    losses.total.backward()
    assert sae.W_dec.grad is not None
    moved = (both - sae.W_dec.grad).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [3, 17]
    assert float(losses.sparsity) == 0


@pytest.mark.parametrize("pre", [torch.ones(8, 10), torch.full((8, 10), -1.0), torch.zeros(8, 10)])
def test_batchtopk_keeps_exactly_k_per_token_however_many_are_equal(pre: Tensor) -> None:
    features, smallest = keep_top_of_batch(pre, 3)
    assert int((features > 0).sum()) == (24 if float(pre[0, 0]) > 0 else 0)
    assert bool(smallest.isfinite()) == (float(pre[0, 0]) > 0)
    assert int((keep_top_of_batch(torch.ones(8, 10).bfloat16(), 3)[0] > 0).sum()) == 24
    assert int((keep_top_of_batch(torch.ones(8, 10), 30)[0] > 0).sum()) == 80  # more than there are


@pytest.mark.parametrize("skew", [0.0, 9.0])
def test_the_largest_of_a_batch_are_found_without_looking_at_all(skew: float) -> None:
    """skew: lifts tokens that the floor is taken from, so that it is too high for the rest."""
    pre = rows(3, 50, 1000)
    pre[:: len(pre) // LOOKED_AT] += skew
    values, places = largest(pre, 4)
    expected = pre.flatten().topk(4000)
    assert sorted(places.tolist()) == sorted(expected.indices.tolist())
    assert torch.equal(values, pre.flatten()[places])


def test_batchtopk_follows_the_smallest_value_that_it_kept(x: Tensor) -> None:
    sae = make_sae(BatchTopKConfig(k=4, threshold_decay=0.9), D_IN, D_SAE).double()
    assert isinstance(sae, BatchTopKSae)
    sae.initialise_(0)

    def smallest(batch: Tensor) -> float:
        pre = sae.pre_activations(batch).detach().flatten()
        return sorted(pre.tolist())[-4 * len(batch)]

    sae.calibrate_(x)
    assert float(sae.threshold) == pytest.approx(smallest(x), abs=1e-12)
    assert float((sae.eval().encode(x) > 0).sum()) == 4 * len(x) - 1  # the threshold itself is not above it
    other = rows(9, D_IN) * 2
    sae.train().loss(other, other, PLAIN)
    wanted = 0.9 * smallest(x) + 0.1 * smallest(other)
    assert float(sae.threshold) == pytest.approx(wanted, abs=1e-12)
    sae.encode(x)  # only a training step moves it
    assert float(sae.threshold) == pytest.approx(wanted, abs=1e-12)
    with torch.no_grad():
        sae.b_enc.sub_(1e6)
    sae.loss(x, x, PLAIN)  # nothing is positive, nothing is kept
    assert float(sae.threshold) == pytest.approx(wanted, abs=1e-12)


def test_outside_training_a_tokens_features_do_not_depend_on_its_batch(x: Tensor) -> None:
    sae = make_used(BatchTopKConfig(k=5)).eval()
    whole = sae.encode(x)
    alone = torch.cat([sae.encode(row[None]) for row in x])
    assert torch.equal(whole > 0, alone > 0)
    assert torch.allclose(whole, alone, atol=1e-12)


def test_batchtopk_is_saved_as_jumprelu_with_one_threshold_in_raw_units(x: Tensor) -> None:
    sae = make_used(BatchTopKConfig(k=5))
    n = Normalisation(torch.zeros(D_IN), 0.25, 1.0)
    weights = sae.fold(n, n)
    assert sae.saelens_architecture == "jumprelu"
    assert "k" not in sae.saelens_fields()
    assert torch.allclose(weights["threshold"], (sae.get_buffer("threshold") / 0.25).float().expand(D_SAE))
    folded = folded_sae({"architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE}, weights)
    assert isinstance(folded, JumpReluSae)


def test_matryoshka_prefixes_are_rounded_shares_that_rise() -> None:
    assert prefix_sizes((0.25, 0.5, 1.0), 40) == [10, 20, 40]
    assert prefix_sizes((1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0), 4608) == [288, 576, 1152, 2304, 4608]
    assert prefix_sizes((0.001, 0.002, 1.0), 40) == [1, 2, 40]
    assert prefix_sizes((0.97, 0.98, 0.99, 1.0), 6) == [3, 4, 5, 6]
    assert prefix_sizes((1.0,), 6) == [6]
    with pytest.raises(ConfigError, match="3 entries, more than the 2 features"):
        prefix_sizes((0.3, 0.6, 1.0), 2)


def test_matryoshka_with_one_prefix_is_batchtopk() -> None:
    one = make_used(MatryoshkaConfig(k=5, prefixes=(1.0,)))
    two = make_used(BatchTopKConfig(k=5))
    context = StepContext(sparsity=0.0, dead=dead_of(some_dead()))
    x, _ = batch(one)
    assert torch.equal(one.loss(x, x, context).total, two.loss(x, x, context).total)


def test_jumprelu_passes_what_is_above_its_threshold_whole(x: Tensor) -> None:
    sae = make_used(JumpReluConfig())
    features, pre = sae.encode(x), sae.pre_activations(x)
    assert torch.equal(features, torch.where(pre > sae.get_parameter("threshold"), pre, 0))


def test_a_threshold_never_falls_below_zero(x: Tensor) -> None:
    sae = make_used(JumpReluConfig())
    threshold = sae.get_parameter("threshold")
    with torch.no_grad():
        threshold.copy_(torch.linspace(-1, 1, D_SAE))
    sae.after_step()
    assert torch.equal(threshold, torch.linspace(-1, 1, D_SAE).double().clamp(min=0))
    assert torch.equal(make(JumpReluConfig()).get_parameter("threshold"), torch.full((D_SAE,), 0.5))


def test_a_dense_start_of_jumprelu_needs_biases() -> None:
    sae, many = make(JumpReluConfig(initial_density=0.8)), rows(1, D_IN, 1000).float()
    sae.calibrate_(many)
    assert torch.equal(sae.get_parameter("threshold"), torch.zeros(D_SAE))
    assert torch.allclose((sae.encode(many) > 0).float().mean(0), torch.full((D_SAE,), 0.8), atol=0.0021)


def test_the_input_of_a_transcoder_is_not_centred_by_its_output_bias(x: Tensor) -> None:
    sae = make_used(TranscoderConfig())
    before = sae.encode(x)
    with torch.no_grad():
        sae.b_dec.add_(3)
    assert torch.equal(sae.encode(x), before)
    assert sae.saelens_fields() == {"d_out": D_OUT, "apply_b_dec_to_input": False}


def test_a_skip_transcoder_adds_its_linear_map_to_what_features_write(x: Tensor) -> None:
    sae = make_used(SkipTranscoderConfig())
    features = sae.encode(x)
    skip = sae.get_parameter("W_skip")
    assert torch.equal(sae.decode(features), features @ sae.W_dec + sae.b_dec)
    assert torch.allclose(sae(x) - sae.decode(features), x @ skip.T, atol=1e-12)
    assert torch.equal(make(SkipTranscoderConfig()).get_parameter("W_skip"), torch.zeros(D_OUT, D_IN))


def test_a_skip_connection_alone_learns_a_linear_map() -> None:
    sae = make(SkipTranscoderConfig()).double()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)  # no feature fires
    x, linear = rows(1, D_IN, 200), rows(2, D_IN, D_OUT)
    y = x @ linear.T + 0.5
    optimizer = torch.optim.LBFGS(sae.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = sae.loss(x, y, PLAIN).total
        total.backward()
        return total

    optimizer.step(closure)
    assert torch.allclose(sae.get_parameter("W_skip"), linear, atol=1e-4)
    assert torch.allclose(sae.b_dec, torch.full((D_OUT,), 0.5).double(), atol=1e-4)
