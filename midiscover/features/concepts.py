"""Which features stand for a concept: ranked on one half of its texts, judged on the other, beside what knows nothing.

A feature scores a text by its highest or by its mean activation there, whichever tells the texts apart better on the
half that ranks; its rank is that AUROC. What is reported is the AUROC of the same score on the half that the ranking
did not see. Raw neurons of the hook, random directions, the SAE as it began and the number of tokens go through the
same, because a score without them shows little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midiscover import lineage
from midiscover.features.concept_scores import Scores
from midiscover.features.concept_stats import Ranked, Separation, family_wise, ranked, resampled_auroc, separation
from midiscover.features.modules import BASELINES, SAE, Concept

VERSION = 1
PASSES = 0.05
"""Family-wise p on the held-out half below which a feature passes."""
ERRORS_APART = 2
"""Standard errors of a difference from which one of two is called better."""
BY = ("max", "mean")
_RESAMPLES = 1000
_PEAK_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptSettings:
    """How concepts are judged."""

    top_features: int = 10
    seed: int = 0
    shuffles: int = 1000


class _Judged(NamedTuple):
    """One system on one concept."""

    document: dict[str, Any]
    first: Tensor
    """[resamples] held-out AUROC of the first feature over resampled texts."""
    top: Tensor
    """[resamples] mean of the top features'."""


class Judge:
    """Judges any number of SAEs on the texts of one concept.

    >>> judge = Judge(concept, ConceptSettings())
    >>> document = judge.document(scored.of[sae], scored.tokens)    # texts of the concept first, then its controls

    A baseline that several SAEs share is judged once.
    """

    def __init__(self, concept: Concept, settings: ConceptSettings) -> None:
        self.concept, self.settings = concept, settings
        self.first, self.held = split(concept, settings.seed)
        self.positive = torch.arange(len(self.first)) < len(concept.texts)
        self._judged: dict[int, tuple[Scores, _Judged]] = {}

    def document(self, scores: Mapping[str, Scores], tokens: Sequence[list[str]]) -> dict[str, Any]:
        """What stands in the JSON of one SAE and this concept; tokens: of each text."""
        groups = {name: self._group(found, tokens) for name, found in scores.items()}
        against = {name: _against(groups[SAE], groups[name]) for name in BASELINES if name in groups}
        concept, settings = self.concept, self.settings
        return {
            "v": VERSION,
            "concept": concept.name,
            "created": lineage.now(),
            "texts": list(concept.texts),
            "controls": list(concept.controls),
            "controls_are": concept.source,
            "paired": concept.paired,
            "held_out": {
                "texts": self.held[: len(concept.texts)].nonzero().flatten().tolist(),
                "controls": self.held[len(concept.texts) :].nonzero().flatten().tolist(),
            },
            "settings": {"top_features": settings.top_features, "seed": settings.seed, "shuffles": settings.shuffles},
            **{name: group.document for name, group in groups.items()},
            "against": against,
            "verdict": verdict(groups[SAE].document, {name: groups[name].document for name in against}, against),
        }

    def held_out(self, scores: Scores) -> Tensor:
        """[features] held-out AUROC of every feature's highest activation, ranked or not."""
        return separation(scores.max[self.held], self.positive[self.held]).auroc

    def _group(self, scores: Scores, tokens: Sequence[list[str]]) -> _Judged:
        # With the scores themselves, so that no others can take their id.
        if id(scores) not in self._judged:
            self._judged[id(scores)] = (scores, self._judge(scores, tokens))
        return self._judged[id(scores)][1]

    def _judge(self, scores: Scores, tokens: Sequence[list[str]]) -> _Judged:
        both = torch.cat([scores.max, scores.mean], dim=1)
        count, positive = scores.max.shape[1], self.positive
        before = separation(both[self.first], positive[self.first])
        top, by_mean = rank(before, min(self.settings.top_features, count))
        chosen = top + count * by_mean
        unseen, labels = both[self.held], positive[self.held]
        after = {end: separation(unseen[:, of], labels) for end, of in (("_max", top), ("_mean", top + count))}
        after[""] = separation(unseen[:, chosen], labels)
        tested = self._family_wise(ranked(unseen[:, chosen]), labels)
        order = ranked(both)
        whole, everywhere = separation(both, positive, order), self._family_wise(order, positive)
        rows: list[dict[str, Any]] = [
            {"feature": feature, "by": BY[int(by_mean[i])], "auroc_ranking": float(before.auroc[chosen[i]])}
            | {f"auroc{end}": float(found.auroc[i]) for end, found in after.items()}
            | {f"effect{end}": float(found.effect[i]) for end, found in after.items()}
            | {"p": float(after[""].p[i]), "family_wise_p": float(tested[i]), "passes": bool(tested[i] < PASSES)}
            | {"q_all_texts": float(whole.q[chosen[i]]), "family_wise_p_all_texts": float(everywhere[chosen[i]])}
            | ({"peaks": self._peaks(scores, feature, tokens)} if scores.peak is not None else {})
            for i, feature in enumerate(top.tolist())
        ]
        drawn = resampled_auroc(
            unseen[:, chosen], labels, paired=self.concept.paired, resamples=_RESAMPLES, seed=self.settings.seed
        )
        document = {
            "features": rows,
            "auroc_first": rows[0]["auroc"],
            "auroc_first_error": float(drawn[:, 0].std()),
            "auroc_held_out": float(after[""].auroc.mean()),
            "auroc_error": float(drawn.mean(1).std()),
            "passing": sum(row["passes"] for row in rows),
            "tested": count,
            "significant_q05": _either(whole.q < 0.05),
            "significant_family_wise": _either(everywhere < PASSES),
        }
        return _Judged(document, drawn[:, 0], drawn.mean(1))

    def _family_wise(self, order: Ranked, positive: Tensor) -> Tensor:
        settings = self.settings
        return family_wise(order, positive, paired=self.concept.paired, shuffles=settings.shuffles, seed=settings.seed)

    def _peaks(self, scores: Scores, feature: int, tokens: Sequence[list[str]]) -> list[str]:
        """Tokens of the concept's texts where the feature is highest, the most frequent ones first."""
        assert scores.peak is not None
        fires = (scores.max[: len(self.concept.texts), feature] > 0).nonzero().flatten().tolist()
        found: Counter[str] = Counter(tokens[text][int(scores.peak[text, feature])] for text in fires)
        return [token for token, _ in found.most_common(_PEAK_TOKENS)]


def split(concept: Concept, seed: int) -> tuple[Tensor, Tensor]:
    """Masks [texts + controls] of the half that ranks and the half that judges; pairs stay together."""
    generator = torch.Generator().manual_seed(seed)
    texts, controls = len(concept.texts), len(concept.controls)
    first = torch.randperm(texts, generator=generator) < texts // 2
    same = first if concept.paired else torch.randperm(controls, generator=generator) < controls // 2
    ranked = torch.cat([first, same])
    return ranked, ~ranked


def rank(before: Separation, most: int) -> tuple[Tensor, Tensor]:
    """The `most` best features, and of each whether its mean tells more than its maximum, both [most].

    before: of the maxima of all features, then of their means. Of equal AUROC the larger effect comes first.
    """
    auroc, effect = (value.view(2, -1) for value in (before.auroc, before.effect))
    by_mean = auroc[1] > auroc[0]
    best, size = (torch.where(by_mean, value[1], value[0]) for value in (auroc, effect))
    order = size.argsort(descending=True, stable=True)
    top = order[best[order].argsort(descending=True, stable=True)][:most]
    return top, by_mean[top]


def _either(marks: Tensor) -> int:
    """Features marked by their maximum, their mean or both."""
    return int(marks.view(2, -1).any(0).sum())


def _against(sae: _Judged, other: _Judged) -> dict[str, Any]:
    """The SAE's held-out AUROC less a baseline's, with the standard error over texts that both were scored on."""
    compared = {}
    for name, key, mine, theirs in (
        ("first", "auroc_first", sae.first, other.first),
        ("top", "auroc_held_out", sae.top, other.top),
    ):
        difference = sae.document[key] - other.document[key]
        error = float((mine - theirs).std())
        apart = abs(difference) > ERRORS_APART * error
        told = "no better than" if not apart else "better than" if difference > 0 else "worse than"
        compared[name] = {"difference": difference, "error": error, "told": told}
    return compared


def verdict(sae: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], against: Mapping[str, Any]) -> str:
    """Whether the SAE's features tell more than what was not trained, in words."""
    most = len(sae["features"])
    parts = [("its first feature", "first", "auroc_first", "auroc_first_error")]
    parts += [(f"its {most} top features on average", "top", "auroc_held_out", "auroc_error")] if most > 1 else []
    sentences = []
    for words, name, key, error in parts:
        told: dict[str, list[str]] = {}
        for other, group in others.items():
            told.setdefault(against[other][name]["told"], []).append(f"{BASELINES[other]} ({group[key]:.3f})")
        clauses = [f", {how} {_listed(which)}" for how, which in told.items()]
        sentences.append(f"{words} {sae[key]:.3f} ± {sae[error]:.3f}{''.join(clauses)}")
    end = "" if others else " Nothing stands beside it, as baselines were left out."
    return f"Held-out AUROC: {'; '.join(sentences)}.{end}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), words[-1]])
