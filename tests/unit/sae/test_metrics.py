"""Every metric against its closed form, on tensors small enough to write the definition out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from midiscover.errors import CorpusError
from midiscover.sae.metrics import DENSITY_EDGES, FOREIGN, MetricSums, density, recovered, recovered_error

TOKENS, D_IN, D_SAE = 50, 6, 20
CHECKED = {
    "tokens",
    "l0",
    "fvu",
    "mse",
    "explained_variance_legacy",
    "explained_variance_residual",
    "cosine",
    "dead_share",
    "inactive_share",
}


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, D_IN, generator=g) * 3 + 1
    x_hat = x + 0.4 * torch.randn(TOKENS, D_IN, generator=g) + 0.2
    features = torch.relu(torch.randn(TOKENS, D_SAE, generator=g) - 0.5)
    features[:, 0] = 0
    return x, x_hat, features


def test_metrics_equal_their_definitions_whatever_the_batches(data: tuple[torch.Tensor, ...]) -> None:
    x, x_hat, features = data
    mean = torch.full((D_IN,), 0.9)
    sums = MetricSums(D_SAE, mean)
    for start, stop in ((0, 7), (7, 8), (8, TOKENS)):
        sums.update(x[start:stop], x_hat[start:stop], features[start:stop])
    found = sums.result()
    assert set(found) == CHECKED | {"density"}, "a metric without its closed form here"
    x64, e64 = x.double(), (x_hat - x).double()
    squared = (e64**2).sum(1)
    spread = ((x64 - mean.double()) ** 2).sum(1)
    assert found["tokens"] == TOKENS
    assert found["l0"] == pytest.approx(sum(int((row > 0).sum()) for row in features) / TOKENS)
    assert found["fvu"] == pytest.approx(float(squared.sum() / spread.sum()))
    assert found["mse"] == pytest.approx(float((e64**2).mean()))
    assert found["explained_variance_legacy"] == pytest.approx(float((1 - squared / spread).mean()))
    variance = torch.var(e64, dim=0, correction=0).sum() / torch.var(x64, dim=0, correction=0).sum()
    assert found["explained_variance_residual"] == pytest.approx(float(1 - variance))
    cosine = (x64 * (x64 + e64)).sum(1) / x64.norm(dim=1) / (x64 + e64).norm(dim=1)
    assert found["cosine"] == pytest.approx(float(cosine.mean()))
    rates = [(features[:, i] > 0).sum().item() / TOKENS for i in range(D_SAE)]
    assert found["dead_share"] == pytest.approx(sum(r == 0 for r in rates) / D_SAE)
    assert found["inactive_share"] == pytest.approx(sum(r <= 1e-3 for r in rates) / D_SAE)
    assert torch.allclose(sums.log_sparsity(), torch.tensor([math.log10(r + 1e-10) for r in rates]))


def test_a_constant_error_is_seen_by_fvu_and_forgiven_by_the_residual_form() -> None:
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(0))
    sums = MetricSums(1, x.mean(0))
    sums.update(x, x + 1, torch.ones(200, 1))
    found = sums.result()
    assert found["explained_variance_residual"] == pytest.approx(1)
    assert found["fvu"] == pytest.approx(D_IN * 200 / float(((x - x.mean(0)) ** 2).sum()), rel=1e-5)


def test_perfect_and_mean_reconstruction_are_the_ends_of_fvu() -> None:
    x = torch.randn(100, D_IN)
    for x_hat, fvu in ((x, 0.0), (x.mean(0).expand_as(x), 1.0)):
        sums = MetricSums(1, x.mean(0))
        sums.update(x, x_hat, torch.ones(100, 1))
        assert sums.result()["fvu"] == pytest.approx(fvu, abs=1e-6)


def test_foreign_fvu_is_about_the_mean_of_its_own_rows(data: tuple[torch.Tensor, ...]) -> None:
    x, x_hat, features = data
    for given in (torch.zeros(D_IN), torch.full((D_IN,), 50.0)):  # the mean that the sums are given changes nothing
        sums = MetricSums(D_SAE, given)
        for rows in torch.arange(TOKENS).split(16):
            sums.update(x[rows], x_hat[rows], features[rows])
        found = sums.foreign()
        x64 = x.double()
        variance = ((x64 - x64.mean(0)) ** 2).sum()
        assert tuple(found) == FOREIGN
        assert found["fvu_foreign"] == pytest.approx(float((x_hat - x).double().pow(2).sum() / variance), rel=1e-9)
        assert found["l0_foreign"] == pytest.approx((features > 0).double().sum(1).mean().item())
        assert found["tokens_foreign"] == TOKENS


def test_foreign_metrics_without_a_usable_row_are_unknown() -> None:
    assert MetricSums(3, torch.zeros(2)).foreign() == {
        "tokens_foreign": 0,
        "l0_foreign": None,
        "fvu_foreign": None,
    }


def test_inactive_features_fire_on_at_most_one_token_in_a_thousand() -> None:
    features = torch.zeros(3000, 4)
    for feature, fires in enumerate((0, 2, 3, 4)):
        features[:fires, feature] = 1
    sums = MetricSums(4, torch.zeros(2))
    sums.update(torch.ones(3000, 2), torch.ones(3000, 2), features)
    found = sums.result()
    assert found["dead_share"] == 1 / 4
    assert found["inactive_share"] == 3 / 4


def test_density_counts_each_feature_once() -> None:
    rate = torch.tensor([0.0, 1.0, 0.5, 1e-3, 1.1e-3, 1e-9])
    found = density(rate)
    assert found["never"] == 1
    assert sum(found["counts"]) == 5
    assert found["counts"][-1] == 1 + (math.log10(0.5) >= DENSITY_EDGES[-2])
    assert found["counts"][0] == 1
    assert len(found["log10_edges"]) == len(found["counts"]) + 1


def test_recovered_share() -> None:
    assert recovered(2.0, 10.0, 2.0) == 1
    assert recovered(2.0, 10.0, 10.0) == 0
    assert recovered(2.0, 10.0, 4.0) == pytest.approx(0.75)
    assert recovered(2.0, 2.0, 3.0) is None


def test_no_row_at_all_is_no_perfect_sae() -> None:
    """0 of 0 unexplained would be FVU 0."""
    with pytest.raises(CorpusError, match="held-out text has no row that SAEs are measured on"):
        MetricSums(D_SAE, torch.zeros(3)).result()


def test_the_error_of_a_share_is_that_of_drawing_other_windows() -> None:
    """Against the spread over resampled windows."""
    generator = np.random.default_rng(0)
    clean = generator.gamma(20, 20, 64)
    ablated = clean + generator.gamma(9, 30, 64)
    spliced = clean + (ablated - clean) * generator.uniform(0.05, 0.3, 64) + generator.normal(0, 4, 64)
    drawn = generator.integers(0, 64, (20_000, 64))
    sums = [values[drawn].sum(1) for values in (clean, ablated, spliced)]
    spread = ((sums[1] - sums[2]) / (sums[1] - sums[0])).std()
    assert recovered_error(clean, ablated, spliced) == pytest.approx(spread, rel=0.03)
    assert recovered_error(clean[:1], ablated[:1], spliced[:1]) is None
    assert recovered_error(clean, clean, spliced) is None
