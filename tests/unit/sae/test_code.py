"""Sparse codes against the dense ones that they stand for, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import midiscover.sae.code
import midiscover.sae.pattern
from midiscover.sae.base import StepContext
from midiscover.sae.code import DenseCode, PreActivations, SparseCode, product, relu_code
from midiscover.sae.pattern import Pattern, places_of, positive
from midiscover.sae.registry import ARCHITECTURES, make_sae
from tests.unit.sae.naive import CONFIGS, rows

TOKENS, D_IN, D_SAE, D_OUT = 30, 6, 20, 5


def sparse(share: float) -> Tensor:
    """[TOKENS, D_SAE], some rows and columns without an entry."""
    made = rows(0, D_SAE, TOKENS).abs() + 0.1
    kept = torch.rand(TOKENS, D_SAE, generator=torch.Generator().manual_seed(1)) < share
    kept[3], kept[-1], kept[:, 0], kept[:, -1] = False, False, False, False
    return torch.where(kept, made, 0)


@pytest.fixture(params=[0.0, 0.2, 1.0], ids=["nothing", "some", "nearly all"])
def dense(request: pytest.FixtureRequest) -> Tensor:
    return sparse(request.param)


def of(dense: Tensor) -> tuple[Tensor, Pattern]:
    """The entries of a code, and where they are."""
    places = dense.flatten().nonzero()[:, 0]
    return dense.flatten()[places], Pattern.of_places(places, *dense.shape)


def test_products_are_those_of_the_dense_matrix(dense: Tensor) -> None:
    values, pattern = of(dense)
    there, wide, tall = dense != 0, rows(2, D_OUT, D_SAE), rows(3, D_OUT, TOKENS)
    assert torch.equal(pattern.matrix(values).to_dense(), dense)
    assert torch.allclose(pattern.times(values, wide), dense @ wide)
    assert torch.allclose(pattern.transposed_times(values, tall), dense.T @ tall)
    assert torch.allclose(pattern.dots(tall, wide), (tall @ wide.T)[there])
    assert torch.allclose(pattern.sums(values), dense.sum(0))
    kept, part = pattern.part(4, 9)
    assert torch.equal(part.matrix(values[kept]).to_dense(), dense[:, 4:13])


def test_rows_of_features_in_any_order_are_a_pattern() -> None:
    features = torch.tensor([[3, 1], [0, 3], [2, 0]])
    found = Pattern.of_rows(features, 4)
    values, wide = torch.arange(1.0, 7.0), rows(2, D_OUT, 4).float()
    dense = torch.zeros(3, 4).scatter(1, features, values.view(3, 2))
    assert torch.allclose(found.times(values, wide), dense @ wide)
    assert torch.allclose(found.transposed_times(values, wide[:3]), dense.T @ wide[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_positive_is_what_is_above_0(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    edges = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 2, -tiny / 2, 1, -1, float("inf"), -float("inf")], dtype=dtype)
    values = torch.cat([edges, torch.randn(1014, generator=torch.Generator().manual_seed(0)).to(dtype)]).view(32, 32)
    assert torch.equal(positive(values), values > 0)
    assert torch.equal(positive(values[::3]), values[::3] > 0)


@pytest.mark.parametrize("short", [2**16, 8])
def test_places_by_feature_are_in_the_order_of_a_stable_sort(
    dense: Tensor, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midiscover.sae.pattern, "SHORT", short)
    pattern = Pattern.of_places(places_of(dense != 0), *dense.shape)
    order, starts = pattern.by_feature
    assert torch.equal(order, pattern.feature.sort(stable=True).indices)
    assert starts.tolist() == [int((pattern.feature < feature).sum()) for feature in range(dense.shape[1] + 1)]


def test_both_codes_do_the_same(dense: Tensor) -> None:
    values, pattern = of(dense)
    decoder, weights = rows(4, D_OUT, D_SAE), rows(5, D_SAE, 1)[0].abs()
    one, two = DenseCode(dense), SparseCode(values, pattern)
    assert torch.allclose(two.decode(decoder), one.decode(decoder))
    assert torch.allclose(two.decode(decoder[5:11], 5), one.decode(decoder[5:11], 5))
    assert torch.allclose(two.total(), one.total())
    assert torch.allclose(two.total(weights), one.total(weights))
    assert torch.equal(two.fired(), one.fired())
    assert torch.allclose(two.l0(), one.l0())
    assert torch.equal(two.dense(), one.dense())


def gradients(below: float, monkeypatch: pytest.MonkeyPatch, share: float) -> list[Tensor]:
    """Of a loss with every use of a code, by x @ W_enc + bias and b_dec, with features that fire by `share`."""
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_BELOW", below)
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_FROM", 0)
    x, encoder, decoder = rows(6, D_IN, TOKENS), rows(7, D_SAE, D_IN), rows(8, D_OUT, D_SAE)
    shift = (x @ encoder).flatten().quantile(1 - share)
    bias, b_dec = rows(9, D_SAE, 1)[0] * 0.1 - shift, rows(10, D_IN, 1)[0] * 0.1
    leaves = [tensor.requires_grad_() for tensor in (encoder, bias, b_dec, decoder)]
    code = relu_code(PreActivations(x, encoder, bias, b_dec))
    assert isinstance(code, SparseCode if below else DenseCode)
    weights = decoder.norm(dim=1)
    (code.decode(decoder).pow(2).sum() + code.total(weights) + code.decode(decoder[:7], 0).sum()).backward()
    found = []
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found


def test_gradients_of_both_are_those_of_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    sparsely, densely = (gradients(below, monkeypatch, 0.3) for below in (1.0, 0.0))
    for one, two in zip(sparsely, densely, strict=True):
        assert float(two.abs().max()) > 0
        assert torch.allclose(one, two)


def test_the_share_that_fires_and_the_size_decide_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x, encoder = rows(6, D_IN, 400), rows(7, D_SAE, D_IN)
    pre = x @ encoder
    for least, share, kind in ((0, 0.05, SparseCode), (0, 0.3, DenseCode), (10**6, 0.05, DenseCode)):
        monkeypatch.setattr(midiscover.sae.code, "SPARSE_FROM", least)
        code = relu_code(PreActivations(x, encoder, -pre.flatten().quantile(1 - share).expand(D_SAE), None))
        assert isinstance(code, kind)
        assert float(code.l0()) == pytest.approx(share * D_SAE, rel=0.1)


@pytest.mark.parametrize("share", [0.3, 0.05])
def test_in_bfloat16_a_sparse_code_has_its_entries_in_float32(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product in bfloat16 says where they are; what they are is computed anew.

    So the decoder's gradient, which goes by their values, is that of float32; the encoder's has entries too many or too
    few where a pre-activation is within rounding of 0.
    """
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_FROM", 0)
    x, encoder, decoder = rows(6, 48, 400).float(), rows(7, 64, 48).float(), rows(8, 48, 64).float()
    shift = (x @ encoder).flatten().quantile(1 - share)
    bias, b_dec = rows(9, 64, 1)[0].float() * 0.1 - shift, rows(10, 48, 1)[0].float() * 0.1

    def found(*, halves: bool) -> tuple[torch.Tensor, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in (encoder, bias, b_dec, decoder)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=halves):
            code = relu_code(PreActivations(x, *leaves[:3]))
            loss = (code.decode(leaves[3]) - x).pow(2).sum() + code.total()
        assert isinstance(code, SparseCode if share < 0.12 else DenseCode)
        loss.backward()
        return code.dense().float(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    (ours, ours_back), (exact, exact_back) = found(halves=True), found(halves=False)
    if share < 0.12:
        apart = (ours > 0) != (exact > 0)  # within the rounding of a product of terms that large
        assert float(apart.float().mean()) < 1e-3
        assert float(exact[apart].max()) < 2**-8 * float((x.abs() @ encoder.abs()).max())
        torch.testing.assert_close(torch.where(apart, 0, ours), torch.where(apart, 0, exact), rtol=1e-5, atol=1e-5)
    errors = [float((one - two).norm() / two.norm()) for one, two in zip(ours_back, exact_back, strict=True)]
    assert max(errors) < 2e-2
    assert errors[3] < (1e-3 if share < 0.12 else 2e-2)


@pytest.mark.parametrize("below", [0.0, 1.0], ids=["dense", "sparse"])
def test_a_product_without_gradient_is_that_of_the_dense_matrices(
    dense: Tensor, below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_BELOW", below)
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_FROM", 0)
    decoder = rows(4, D_OUT, D_SAE)
    assert torch.allclose(product(dense, decoder), dense @ decoder)
    assert torch.allclose(product(dense.view(5, 6, D_SAE), decoder), dense.view(5, 6, D_SAE) @ decoder)
    assert torch.allclose(product(dense[0], decoder), dense[0] @ decoder)
    assert torch.equal(places_of(dense != 0), dense.flatten().nonzero()[:, 0])
    decoder.requires_grad_()
    product(dense, decoder).sum().backward()
    assert decoder.grad is not None
    assert torch.allclose(decoder.grad, dense.sum(0)[:, None].expand(-1, D_OUT))
    with torch.no_grad():
        assert not product(dense, decoder).requires_grad


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_several_threads_give_the_same_gradients_each_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, at a size at which torch does share the work out."""
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_BELOW", 1.0)
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_FROM", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        sae = make_sae(CONFIGS[kind], 64, 512, 48 if ARCHITECTURES[kind].transcodes else None)
        sae.initialise_(0)
        x, y = rows(1, 64, 1024).float(), rows(2, sae.d_out, 1024).float()
        found = []
        for _ in range(3):
            sae.zero_grad()
            losses = sae.loss(x, y if sae.transcodes else x, StepContext(sparsity=0.3, dead=None))
            losses.total.backward()
            found.append([p.grad.clone() for p in sae.parameters() if p.grad is not None])
        for again in found[1:]:
            assert all(torch.equal(one, two) for one, two in zip(found[0], again, strict=True))
    finally:
        torch.set_num_threads(threads)
