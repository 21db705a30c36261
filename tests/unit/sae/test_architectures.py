"""What holds for every architecture and runs on each that is registered; test_kinds.py has what is special to one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import midiscover.sae.code
from midiscover import load_sae
from midiscover.errors import ConfigError, CorruptError, UserError
from midiscover.sae.base import Normalisation, Sae, StepContext
from midiscover.sae.code import DenseCode, SparseCode
from midiscover.sae.registry import ARCHITECTURES, FOLDED, folded_sae, make_sae
from midiscover.saeconfig import SAE_KINDS, PenaltyConfig, TopKConfig
from tests.unit.sae.naive import CONFIGS, D_IN, D_SAE, NAIVE, TOKENS, batch, dead_of, make, make_used, rows, some_dead

KINDS = sorted(ARCHITECTURES)
INPUTS = Normalisation(torch.linspace(2, 3, D_IN, dtype=torch.float64), 0.37, 1.0)


@pytest.fixture(params=KINDS)
def sae(request: pytest.FixtureRequest) -> Sae:
    return make_used(CONFIGS[request.param])


def outputs(sae: Sae) -> Normalisation:
    """Of the hook that is predicted; the inputs' but for transcoders."""
    return Normalisation(torch.linspace(-1, 4, sae.d_out).double(), 2.3, 1.0) if sae.transcodes else INPUTS


def cfg_of(sae: Sae) -> dict[str, object]:
    sizes: dict[str, object] = {"architecture": sae.saelens_architecture, "d_in": sae.d_in, "d_sae": sae.d_sae}
    return sizes | sae.saelens_fields()


def context(sae: Sae, spare: int = 2) -> StepContext:
    return StepContext(sparsity=0.35, dead=dead_of(some_dead(), spare=spare) if sae.uses_dead else None)


def test_every_architecture_has_a_config_and_a_naive_formula_here() -> None:
    assert sorted(CONFIGS) == sorted(NAIVE) == KINDS == sorted(SAE_KINDS)
    assert {cls.saelens_architecture for cls in ARCHITECTURES.values()} == set(FOLDED)


@pytest.mark.parametrize("below", [0.0, 1.0], ids=["dense", "sparse"])
def test_loss_and_gradients_equal_those_of_the_naive_formula(
    sae: Sae, below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_BELOW", below)
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_FROM", 0)
    x, y = batch(sae)
    losses = sae.loss(x, y, context(sae))
    losses.total.backward()
    wanted = NAIVE[sae.kind](sae, x, y, context(sae))
    assert torch.allclose(losses.total, wanted, atol=1e-9)
    expected = torch.autograd.grad(wanted, list(sae.parameters()))
    for (name, parameter), gradient in zip(sae.named_parameters(), expected, strict=True):
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, gradient, atol=1e-9), name
        assert float(gradient.abs().max()) > 1e-3, name  # the test sees each of them
    assert isinstance(losses.code, SparseCode if below else DenseCode)


@pytest.mark.parametrize("below", [0.0, 1.0], ids=["dense", "sparse"])
def test_the_losses_say_what_the_reconstruction_is(sae: Sae, below: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_BELOW", below)
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_FROM", 0)
    x, y = batch(sae)
    losses = sae.loss(x, y, context(sae))
    whole = sae.output(x, losses.code.dense())
    assert torch.allclose(losses.mse, ((whole - y) ** 2).sum(1).mean())
    features = losses.code.dense()
    assert torch.equal(losses.code.fired(), (features > 0).any(0))
    assert float(losses.code.l0()) == pytest.approx(float((features > 0).sum(1).double().mean()))
    assert not any(part.requires_grad for part in (losses.mse, losses.sparsity, features))


def test_forward_is_output_of_encode(sae: Sae) -> None:
    sae.eval()
    x, _ = batch(sae)
    features = sae.encode(x)
    assert torch.equal(sae(x), sae.output(x, features))
    assert (features >= 0).all()
    assert 0 < float((features > 0).double().mean()) < 0.9


def test_in_bfloat16_gradients_are_finite_and_about_the_same(sae: Sae) -> None:
    sae.float()
    x, y = (part.float() for part in batch(sae))
    exact = sae.loss(x, y, context(sae)).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = sae.loss(x, y, context(sae))
    losses.total.backward()
    assert losses.total.dtype == losses.mse.dtype == losses.sparsity.dtype == torch.float32
    assert torch.allclose(losses.total, exact, rtol=0.02)
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_initialisation_is_the_same_for_the_same_seed(kind: str) -> None:
    sae, again, other = make(CONFIGS[kind]), make(CONFIGS[kind]), make(CONFIGS[kind], seed=4)
    again.initialise_(seed=3)
    for (name, one), two in zip(sae.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(sae.W_dec, other.W_dec)
    assert not torch.equal(sae.W_enc, other.W_enc)
    sparse = getattr(sae.config, "initial_density", None) is not None
    norm = 1.0 if sae.unit_decoder or sparse else 0.1
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.full((D_SAE,), norm))
    smaller = 0.1 if "topk" in kind else 1.0
    assert torch.allclose(sae.W_enc.norm(dim=0), torch.full((D_SAE,), norm * smaller))
    if not sae.transcodes:
        assert torch.allclose(sae.W_enc, sae.W_dec.T * smaller)
    assert torch.equal(sae.b_dec, torch.zeros(sae.d_out))


def test_a_transcoders_encoder_has_directions_of_its_own() -> None:
    for kind in KINDS:
        if ARCHITECTURES[kind].transcodes:
            square = make_sae(CONFIGS[kind], D_IN, D_SAE, D_IN)
            square.initialise_(0)
            cosines = torch.cosine_similarity(square.W_enc.T, square.W_dec, dim=1)
            assert float(cosines.detach().abs().mean()) < 0.5  # 0.23 for random ones


def test_folding_takes_raw_activations_and_gives_unit_rows(sae: Sae) -> None:
    """The folded SAE on raw x equals: normalise, run the trained SAE, undo the normalisation."""
    sae.eval()
    after, (x, _) = outputs(sae), batch(sae)
    raw = x * 4 + 2
    normalised = INPUTS.scale * (raw - INPUTS.mean)
    weights = sae.fold(INPUTS, after)
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in weights.values())
    folded = folded_sae(cfg_of(sae), weights).double().eval()
    expected = sae(normalised) / after.scale + after.mean
    assert torch.allclose(folded(raw), expected, atol=1e-5)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(D_SAE).double(), atol=1e-6)
    trained, raw_features = sae.encode(normalised), folded.encode(raw)
    assert torch.equal(trained > 0, raw_features > 0)
    assert torch.allclose(raw_features, trained * sae.W_dec.norm(dim=1) / after.scale, atol=1e-4)


def test_a_saved_sae_is_loaded_as_it_was(sae: Sae, tmp_path: Path) -> None:
    sae.eval()
    after, (x, _) = outputs(sae), batch(sae)
    weights = sae.fold(INPUTS, after)
    save_file(weights, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg_of(sae)))
    loaded = load_sae(str(tmp_path))
    assert not loaded.module.training
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(value, weights[name]), name
    raw = (x / INPUTS.scale + INPUTS.mean).float()
    features = loaded.encode(raw)
    wanted = sae.encode(x) * sae.W_dec.norm(dim=1) / after.scale
    assert torch.allclose(features.double(), wanted, atol=1e-5)
    assert torch.allclose(loaded.reconstruct(raw).double(), sae(x) / after.scale + after.mean, atol=1e-5)
    assert torch.equal(loaded.module.output(raw, features), loaded.reconstruct(raw))
    assert torch.equal(loaded.decode(features), features @ weights["W_dec"] + weights["b_dec"])


def test_a_frozen_decoder_stays_while_the_rest_learns(sae: Sae) -> None:
    sae.W_dec.requires_grad_(False)
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    x, y = batch(sae)
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=0.1)
    sae.loss(x, y, context(sae)).total.backward()
    sae.before_step()
    optimizer.step()
    sae.after_step()
    for name, value in sae.named_parameters():
        assert torch.equal(value, before[name]) == (name == "W_dec"), name
    assert sae.W_dec.grad is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if ARCHITECTURES[kind](CONFIGS[kind], 4, 8).unit_decoder])
def test_unit_rows_stay_and_gradients_lie_in_the_tangent(kind: str) -> None:
    assert_unit_rows(make_used(CONFIGS[kind]))


def assert_unit_rows(sae: Sae) -> None:
    """Also called for settings that are not in CONFIGS."""
    x, y = batch(sae)
    sae.loss(x, y, context(sae)).total.backward()
    assert sae.W_dec.grad is not None
    free = sae.W_dec.grad.clone()
    sae.before_step()
    along = ((free * sae.W_dec).sum(1, keepdim=True) * sae.W_dec).detach()
    assert float(along.abs().max()) > 1e-3
    assert torch.allclose(sae.W_dec.grad, free - along, atol=1e-12)
    with torch.no_grad():
        sae.W_dec.sub_(0.1 * sae.W_dec.grad)
    assert not torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double())
    sae.after_step()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE).double(), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_are_features_of_either_sign(kind: str) -> None:
    config = CONFIGS[kind]
    if isinstance(config, PenaltyConfig):
        config = dataclasses.replace(config, initial_density=None)  # as training makes them
    sae = make_sae(config, D_IN, 2 * D_IN)
    sae.initialise_(0)
    if sae.transcodes:
        with pytest.raises(ConfigError, match="neurons"):
            sae.initialise_neurons_()
        return
    sae.initialise_neurons_()
    x = rows(1, D_IN, 200).float()
    sae.calibrate_(x)
    features, wanted = sae.eval().encode(x), torch.relu(torch.cat([x, -x], dim=1))
    if isinstance(config, TopKConfig):
        assert float((features > 0).sum(1).float().mean()) == pytest.approx(config.k, abs=0.01)
        assert torch.equal(features, wanted * (features > 0))
    else:
        assert torch.equal(features, wanted)
        assert torch.allclose(sae(x), x, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if isinstance(CONFIGS[kind], PenaltyConfig)])
def test_initial_density_is_what_each_feature_begins_with(kind: str) -> None:
    config = CONFIGS[kind]
    assert isinstance(config, PenaltyConfig)
    sae, x = make(replace(config, initial_density=0.05)), rows(1, D_IN, 1000).float()
    sae.calibrate_(x)
    rates = (sae.encode(x) > 0).float().mean(0)
    assert torch.allclose(rates, torch.full((D_SAE,), 0.05), atol=0.0021)


def test_an_unknown_architecture_is_an_error_and_never_a_relu(sae: Sae) -> None:
    class Foreign:
        kind = "gated_v9"

    with pytest.raises(UserError, match=r"gated_v9.*known are"):
        make_sae(Foreign(), 4, 8)
    for name in ("batchtopk", "jumprelu_transcoder", "gated_v9", None):
        with pytest.raises(UserError, match=rf"'{name}' is not known.*known are standard"):
            folded_sae(cfg_of(sae) | {"architecture": name}, sae.fold(INPUTS, outputs(sae)))


def test_weights_that_do_not_fit_their_cfg_are_named(sae: Sae, tmp_path: Path) -> None:
    weights: dict[str, Tensor] = sae.fold(INPUTS, outputs(sae))
    (tmp_path / "cfg.json").write_text(json.dumps(cfg_of(sae)))
    for wrong in (weights | {"more": torch.ones(1)}, {k: v for k, v in weights.items() if k != "b_dec"}):
        save_file(wrong, tmp_path / "sae_weights.safetensors")
        with pytest.raises(CorruptError, match=r"are not those of a \w+ SAE of its widths: .*(more|b_dec)"):
            load_sae(str(tmp_path))


def test_the_batch_is_large_enough_to_tell_kinds_apart() -> None:
    assert TOKENS * 5 < TOKENS * D_SAE / 4
