"""Concept scores: each statistic against scipy or a loop, and how often chance passes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from midiscover.features.concept_stats import auroc, benjamini_hochberg, family_wise, midranks, separation
from midiscover.features.concepts import ConceptSettings, Scores, judge
from midiscover.features.modules import Concept

TEXTS = 60


def scores(features: int = 40, seed: int = 0, texts: int = TEXTS) -> Tensor:
    """Like maxima of sparse features: many zeros, so many ties."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2 * texts, features, generator=generator) - 0.5).clamp(min=0)


POSITIVE = torch.arange(2 * TEXTS) < TEXTS


def test_every_statistic_is_scipys() -> None:
    x = scores()
    x[:, 3] = 0  # never fires
    x[POSITIVE, 4] += 1
    found = separation(x, POSITIVE)
    for f in range(x.shape[1]):
        a, b = x[POSITIVE, f].double().numpy(), x[~POSITIVE, f].double().numpy()
        assert midranks(x.double())[:, f].tolist() == scipy.stats.rankdata(x[:, f].double().numpy()).tolist()
        if f == 3:
            assert (float(found.auroc[f]), float(found.effect[f]), float(found.p[f])) == (0.5, 0, 1)
            continue
        test = scipy.stats.mannwhitneyu(a, b, alternative="greater", method="asymptotic")
        assert float(found.p[f]) == pytest.approx(float(test.pvalue), rel=1e-9)
        assert float(found.auroc[f]) == pytest.approx(test.statistic / len(a) / len(b), rel=1e-12)
        wins = np.mean([(p > q) + (p == q) / 2 for p, q in itertools.product(a, b)])
        assert float(found.auroc[f]) == pytest.approx(wins, rel=1e-12)
        pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
        assert float(found.effect[f]) == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-9)
    assert found.q.numpy() == pytest.approx(scipy.stats.false_discovery_control(found.p.numpy(), method="bh"))
    assert torch.equal(auroc(x, POSITIVE), found.auroc)


def test_false_discovery_rates_of_one_p() -> None:
    assert benjamini_hochberg(torch.tensor([0.03], dtype=torch.float64)).tolist() == [0.03]


@pytest.mark.parametrize("paired", [True, False])
def test_family_wise_is_the_share_of_all_labellings(paired: bool) -> None:
    """Against every labelling of four pairs, or of eight texts, counted out."""
    x = scores(features=3, seed=5, texts=4)
    x[:4, 1] += 0.6
    positive = torch.arange(8) < 4
    if paired:
        labellings = [
            [s == 0 for s in swaps] + [s == 1 for s in swaps] for swaps in itertools.product((0, 1), repeat=4)
        ]
    else:
        labellings = [[i in chosen for i in range(8)] for chosen in itertools.combinations(range(8), 4)]
    highest = np.array([float(auroc(x, torch.tensor(labels)).max()) for labels in labellings])
    exact = [(highest >= float(value) - 1e-9).mean() for value in auroc(x, positive)]
    found = family_wise(x, positive, paired=paired, shuffles=20_000, seed=1)
    assert found.numpy() == pytest.approx(exact, abs=0.015)


def concept(texts: int = TEXTS, *, paired: bool = True) -> Concept:
    words = tuple(f"text {i}" for i in range(texts))
    return Concept(name="c", texts=words, controls=words, paired=paired, source="made up")


def test_a_planted_feature_is_found_and_judged_on_unseen_texts() -> None:
    x = scores(features=500, seed=2)
    x[POSITIVE, 77] += 1.5
    noise = scores(features=500, seed=6)  # one set in twenty passes by chance; this is none of those
    document = judge(
        concept(),
        {"sae_scores": Scores(x, x / 2), "neurons": Scores(noise, noise), "untrained": Scores(noise, noise)},
        ConceptSettings(top_features=5),
    )
    first, *others = document["sae_scores"]["features"]
    assert (first["feature"], first["passes"]) == (77, True)
    assert first["auroc"] > 0.9
    assert first["auroc_mean"] == first["auroc"]
    assert not any(row["passes"] for row in others)
    assert document["sae_scores"]["significant_family_wise"] == 1
    assert document["neurons"]["passing"] == 0
    assert document["held_out_texts"] == TEXTS
    held = separation(x[_held(document)], POSITIVE[_held(document)])
    assert first["auroc"] == pytest.approx(float(held.auroc[77]), rel=1e-12)


def _held(_document: object) -> Tensor:
    order = torch.randperm(TEXTS, generator=torch.Generator().manual_seed(0))
    return torch.cat([order >= TEXTS / 2] * 2)


def test_the_verdict_says_when_nothing_is_gained() -> None:
    x, noise = scores(features=200, seed=4), scores(features=200, seed=5)
    groups = {"sae_scores": Scores(x, x), "neurons": Scores(noise, noise)}
    document = judge(concept(), groups, ConceptSettings())
    assert "no better than the raw neurons" in document["verdict"]
    assert document["better_than"] == []
    strong = noise.clone()
    strong[POSITIVE, :12] += 2
    groups["neurons"] = Scores(strong, strong)
    document = judge(concept(), groups, ConceptSettings())
    assert "worse than the raw neurons" in document["verdict"]
    assert document["better_than"] == []
    groups["sae_scores"], groups["neurons"] = groups["neurons"], groups["sae_scores"]
    document = judge(concept(), groups, ConceptSettings())
    assert ": held-out AUROC" in document["verdict"]
    assert ", better than the raw neurons" in document["verdict"]
    assert document["better_than"] == ["neurons"]


@pytest.mark.parametrize("paired", [True, False])
def test_random_texts_pass_no_more_often_than_said(paired: bool) -> None:
    """20 sets of texts without any concept, features that are correlated as those of an SAE are.

    A set passes where any of its top features does: 5 % of 20 are 1. More than 3 have a chance of 1.6 %.
    """
    passed = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(100 + seed)
        topics = torch.randn(2 * TEXTS, 12, generator=generator)
        x = (topics @ torch.randn(12, 300, generator=generator) / 4 + scores(300, seed=seed)).clamp(min=0)
        document = judge(concept(paired=paired), {"sae_scores": Scores(x, x)}, ConceptSettings(shuffles=400))
        passed += document["sae_scores"]["passing"] > 0
    assert passed <= 3
