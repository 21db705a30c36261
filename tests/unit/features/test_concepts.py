"""Concept scores: each statistic against scipy or a loop, and how often chance passes."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from midiscover.features.concept_scores import Scores
from midiscover.features.concept_stats import (
    benjamini_hochberg,
    family_wise,
    ranked,
    resampled_auroc,
    separation,
)
from midiscover.features.concepts import ConceptSettings, Judge, rank, split
from midiscover.features.modules import Concept

TEXTS = 60
POSITIVE = torch.arange(2 * TEXTS) < TEXTS


def scores(features: int = 40, seed: int = 0, texts: int = TEXTS) -> Tensor:
    """Like maxima of sparse features: many zeros, so many ties."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2 * texts, features, generator=generator) - 0.5).clamp(min=0)


def test_every_statistic_is_scipys() -> None:
    x = scores()
    x[:, 3] = 0  # never fires
    x[POSITIVE, 4] += 1
    found = separation(x, POSITIVE)
    for f in range(x.shape[1]):
        a, b = x[POSITIVE, f].double().numpy(), x[~POSITIVE, f].double().numpy()
        assert ranked(x).ranks[:, f].tolist() == scipy.stats.rankdata(x[:, f].numpy()).tolist()
        if f == 3:
            assert (float(found.auroc[f]), float(found.effect[f]), float(found.p[f])) == (0.5, 0, 1)
            continue
        test = scipy.stats.mannwhitneyu(a, b, alternative="greater", method="asymptotic")
        assert float(found.p[f]) == pytest.approx(float(test.pvalue), rel=1e-9)
        assert float(found.auroc[f]) == pytest.approx(test.statistic / len(a) / len(b), rel=1e-12)
        assert float(found.auroc[f]) == pytest.approx(area(a, b), rel=1e-12)
        pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
        assert float(found.effect[f]) == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-9)
    assert found.q.numpy() == pytest.approx(scipy.stats.false_discovery_control(found.p.numpy(), method="bh"))


def test_groups_may_differ_in_size() -> None:
    x, positive = scores(features=8, texts=30), torch.arange(60) % 5 == 0
    found = separation(x, positive)
    for f in range(8):
        a, b = x[positive, f].double().numpy(), x[~positive, f].double().numpy()
        test = scipy.stats.mannwhitneyu(a, b, alternative="greater", method="asymptotic")
        assert float(found.p[f]) == pytest.approx(float(test.pvalue), rel=1e-9)
        pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(x) - 2))
        assert float(found.effect[f]) == pytest.approx((a.mean() - b.mean()) / pooled, rel=1e-9)


def area(a: Any, b: Any) -> float:
    return float(np.mean([(p > q) + (p == q) / 2 for p, q in itertools.product(a, b)]))


def test_false_discovery_rates_of_one_p() -> None:
    assert benjamini_hochberg(torch.tensor([0.03], dtype=torch.float64)).tolist() == [0.03]


@pytest.mark.parametrize("paired", [True, False])
def test_family_wise_is_the_share_of_all_labellings(paired: bool) -> None:
    """Against every labelling of four pairs, or of eight texts, counted out with scipy's statistic."""
    x = scores(features=3, seed=5, texts=4)
    x[:4, 1] += 0.6
    x = torch.cat([x, torch.zeros(8, 1)], dim=1)  # and one that never fires
    positive = [i < 4 for i in range(8)]
    if paired:
        labellings = [
            [s == 0 for s in swaps] + [s == 1 for s in swaps] for swaps in itertools.product((0, 1), repeat=4)
        ]
    else:
        labellings = [[i in chosen for i in range(8)] for chosen in itertools.combinations(range(8), 4)]

    def standardised(labels: list[bool]) -> list[float]:
        found = []
        for column in x.double().numpy().T[:3]:
            a, b = column[labels], column[~np.array(labels)]
            u = scipy.stats.mannwhitneyu(a, b).statistic
            _, ties = np.unique(column, return_counts=True)
            found.append((u - 8) / np.sqrt(16 / 12 * (9 - (ties**3 - ties).sum() / 56)))
        return [*found, 0.0]

    highest = np.array([max(standardised(labels)) for labels in labellings])
    exact = [(highest >= value - 1e-9).mean() for value in standardised(positive)]
    found = family_wise(ranked(x), torch.tensor(positive), paired=paired, shuffles=20_000, seed=1)
    assert found.numpy() == pytest.approx(exact, abs=0.015)


def test_resampled_auroc_is_that_of_drawn_texts() -> None:
    """Against its standard error by DeLong's formula, and pairs against a loop."""
    x = scores(features=3, seed=1)
    x[POSITIVE] += 0.5
    drawn = resampled_auroc(x, POSITIVE, paired=False, resamples=4000, seed=0)
    for f in range(3):
        a, b = x[POSITIVE, f].numpy(), x[~POSITIVE, f].numpy()
        wins = (a[:, None] > b) + (a[:, None] == b) / 2
        delong = np.sqrt(wins.mean(1).var(ddof=1) / len(a) + wins.mean(0).var(ddof=1) / len(b))
        assert float(drawn[:, f].std()) == pytest.approx(delong, rel=0.05)
        assert float(drawn[:, f].mean()) == pytest.approx(area(a, b), abs=0.005)
    pairs = resampled_auroc(x, POSITIVE, paired=True, resamples=3, seed=7)
    drawn_pairs = torch.randint(TEXTS, (3, TEXTS), generator=torch.Generator().manual_seed(7))
    for r, draw in enumerate(drawn_pairs):
        a, b = x[:TEXTS][draw, 0].numpy(), x[TEXTS:][draw, 0].numpy()
        assert float(pairs[r, 0]) == pytest.approx(area(a, b), rel=1e-12)


def test_resampled_auroc_holds_no_pairs_of_texts() -> None:
    """All pairs of these would take 80 GB as booleans alone, and half of them are ties."""
    count = 100_000
    x = torch.arange(4 * count).remainder(2)[:, None].repeat(1, 2).float()
    x[:, 1] = 1 - x[:, 1]
    positive = torch.arange(4 * count) >= 2 * count
    x[positive, 0] += 1
    drawn = resampled_auroc(x, positive, paired=False, resamples=2, seed=0)
    assert drawn[:, 0].tolist() == pytest.approx([0.875] * 2, abs=0.01)
    assert drawn[:, 1].tolist() == pytest.approx([0.5] * 2, abs=0.01)


def concept(texts: int = TEXTS, controls: int | None = None, *, paired: bool = True) -> Concept:
    words, others = (tuple(f"{name} {i}" for i in range(n)) for name, n in (("a", texts), ("b", controls or texts)))
    return Concept(name="c", texts=words, controls=others, paired=paired, source="made up")


def judged(groups: dict[str, Scores], settings: ConceptSettings | None = None, *, paired: bool = True) -> Any:
    tokens = [["word"] for _ in range(2 * TEXTS)]
    document = Judge(concept(paired=paired), settings or ConceptSettings()).document(groups, tokens)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    return document


@pytest.mark.parametrize("paired", [True, False])
def test_halves_share_no_text_and_keep_pairs_together(paired: bool) -> None:
    made = concept(31, 31 if paired else 44, paired=paired)
    first, held = split(made, seed=3)
    assert torch.equal(first, ~held)
    assert (int(first[:31].sum()), int(first[31:].sum())) == (15, 15 if paired else 22)
    if paired:
        assert torch.equal(first[:31], first[31:])
    assert not torch.equal(first, split(made, seed=4)[0])


def test_ranks_are_by_the_better_of_both_scores_then_by_effect() -> None:
    both = torch.cat([scores(features=30, seed=8), scores(features=30, seed=9)], dim=1)
    both[:, 5], both[:, 35] = both[:, 4] * 2 + POSITIVE / 100, 0  # same order as feature 4 but for ties, other effect
    found = separation(both, POSITIVE)
    top, by_mean = rank(found, 30)
    auroc, effect = found.auroc.view(2, 30), found.effect.view(2, 30)
    better = [int(auroc[1, f] > auroc[0, f]) for f in range(30)]
    want = sorted(range(30), key=lambda f: (-float(auroc[better[f], f]), -float(effect[better[f], f]), f))
    assert top.tolist() == want
    assert by_mean.tolist() == [bool(better[f]) for f in want]


def test_a_planted_feature_is_found_and_judged_on_unseen_texts() -> None:
    x, y = scores(features=500, seed=2), scores(features=500, seed=3)
    x[POSITIVE, 77] += 1.5  # its maximum tells
    y[POSITIVE, 78] += 1.5  # its mean tells
    noise = scores(features=500, seed=6)  # one set in twenty passes by chance; this is none of those
    peak = torch.zeros(x.shape, dtype=torch.int32)
    groups = {"sae_scores": Scores(x, y, peak), "neurons": Scores(noise, noise)}
    document = judged(groups, ConceptSettings(top_features=5))
    rows = document["sae_scores"]["features"]
    assert {(row["feature"], row["by"]) for row in rows[:2]} == {(77, "max"), (78, "mean")}
    assert [row["passes"] for row in rows] == [True, True, False, False, False]
    assert document["sae_scores"]["significant_family_wise"] == 2
    assert document["sae_scores"]["tested"] == 500
    assert document["neurons"]["passing"] == 0
    assert [row["peaks"] for row in rows] == [["word"]] * 5
    held = torch.zeros(2 * TEXTS, dtype=torch.bool)
    held[document["held_out"]["texts"]] = True
    held[TEXTS + torch.tensor(document["held_out"]["controls"])] = True
    assert int(held.sum()) == TEXTS
    for row in rows:
        column = (x if row["by"] == "max" else y)[:, row["feature"]]
        a, b = column[held & POSITIVE].numpy(), column[held & ~POSITIVE].numpy()
        assert row["auroc"] == pytest.approx(area(a, b), rel=1e-12)
        assert row["auroc"] == row[f"auroc_{row['by']}"]
        a, b = y[held & POSITIVE, row["feature"]].numpy(), y[held & ~POSITIVE, row["feature"]].numpy()
        assert row["auroc_mean"] == pytest.approx(area(a, b), rel=1e-12)
    whole = separation(torch.cat([x, y], dim=1), POSITIVE)
    assert rows[0]["q_all_texts"] in (float(whole.q[77]), float(whole.q[578]))


def test_what_is_judged_never_reads_the_labels_of_the_other_half() -> None:
    """Swapping held-out texts with their controls changes no rank, and turns every held-out AUROC round."""
    x = scores(features=200, seed=11)
    x[POSITIVE, 20] += 1
    before = judged({"sae_scores": Scores(x, x)})
    held = torch.tensor(before["held_out"]["texts"])
    turned = x.clone()
    turned[held], turned[held + TEXTS] = x[held + TEXTS], x[held]
    after = judged({"sae_scores": Scores(turned, turned)})
    for a, b in zip(before["sae_scores"]["features"], after["sae_scores"]["features"], strict=True):
        assert a["feature"] == b["feature"]
        assert a["auroc"] == pytest.approx(1 - b["auroc"])


def test_the_verdict_says_when_nothing_is_gained() -> None:
    x, noise = scores(features=200, seed=4), scores(features=200, seed=5)
    groups = {"sae_scores": Scores(x, x), "neurons": Scores(noise, noise)}
    assert judged(groups)["verdict"].count("no better than raw neurons") == 2
    strong = noise.clone()
    strong[POSITIVE, :12] += 2
    strong = Scores(strong, strong)
    worse = judged({**groups, "neurons": strong, "untrained": strong})["verdict"]
    assert worse.count(", worse than raw neurons (") == worse.count(") and the untrained SAE (") == 2
    better = judged({"sae_scores": strong, "neurons": groups["neurons"]})
    assert better["verdict"].count("better than raw neurons") == 2
    assert "no better" not in better["verdict"]
    first = better["against"]["neurons"]["first"]
    assert first["difference"] == better["sae_scores"]["auroc_first"] - better["neurons"]["auroc_first"]
    assert "baselines were left out" in judged({"sae_scores": strong})["verdict"]


def test_a_shared_baseline_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    judge = Judge(concept(), ConceptSettings(shuffles=10))
    monkeypatch.setattr(judge, "_family_wise", lambda order, labels: seen.append(0) or torch.ones(len(order.ties)))
    noise = Scores(scores(), scores())
    documents = [
        judge.document({"sae_scores": Scores(x, x), "neurons": noise}, [["w"]] * 2 * TEXTS)
        for x in (scores(seed=1), scores(seed=2))
    ]
    assert documents[0]["neurons"] == documents[1]["neurons"]
    assert len(seen) == 6  # two for each of three


@pytest.mark.parametrize("paired", [True, False])
def test_random_texts_pass_no_more_often_than_said(paired: bool) -> None:
    """20 random halves of one pool of texts in place of a concept, features correlated as those of an SAE are.

    A set passes where any of its top features does: 5 % of 20 are 1. More than 3 have a chance of 1.6 %.
    """
    generator = torch.Generator().manual_seed(100)
    pool = 200
    topics = torch.randn(pool, 12, generator=generator)
    x = topics @ torch.randn(12, 300, generator=generator) / 4 + torch.randn(pool, 300, generator=generator)
    x, y = (x - 0.5).clamp(min=0), (x - 0.2).clamp(min=0) + torch.rand(pool, 300, generator=generator)
    chance = random.Random(1)
    passed = features = 0
    for _ in range(20):
        texts = chance.sample(range(pool), 2 * TEXTS)
        document = judged({"sae_scores": Scores(x[texts], y[texts])}, ConceptSettings(shuffles=400), paired=paired)
        passed += document["sae_scores"]["passing"] > 0
        features += document["sae_scores"]["passing"]
    assert passed <= 3
    assert features <= 10  # of 200: 5 %
