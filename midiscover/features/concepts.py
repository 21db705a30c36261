"""Which features stand for a concept: ranked on one half of its texts, judged on the other, beside what knows nothing.

A feature's score of a text is its highest activation there (its mean is judged as well). Features are ranked by AUROC
on the first half; what is reported is their AUROC on the half that the ranking did not see. The same is done with the
raw neurons of the hook (each with both signs) and with an untrained SAE, because a score without them shows little.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midiscover import lineage
from midiscover.features.concept_stats import Separation, auroc, family_wise, separation
from midiscover.features.modules import Concept
from midiscover.interpret import EncodedText, encode_texts, hook_of
from midiscover.lm import LanguageModel
from midiscover.sae.registry import folded_sae
from midiscover.saes import LoadedSae

VERSION = 1
PASSES = 0.05
"""Family-wise p on the held-out half below which a feature passes."""
SAE, NEURONS, UNTRAINED = "sae_scores", "neurons", "untrained"
BASELINES = {NEURONS: "raw neurons, both signs", UNTRAINED: "untrained SAE of the same width"}


class Scores(NamedTuple):
    """Of texts, [texts, features] float32."""

    max: Tensor
    mean: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ConceptSettings:
    """How concepts are judged."""

    top_features: int = 10
    seed: int = 0
    shuffles: int = 1000
    baselines: bool = True


def score_texts(
    lm: LanguageModel, saes: Mapping[str, LoadedSae], texts: Sequence[str], settings: ConceptSettings
) -> dict[str, dict[str, Scores]]:
    """SAE -> (`sae_scores`, and where asked for `neurons` and `untrained`) -> scores. One forward pass for all SAEs."""
    blank = {sae: _untrained(loaded, settings.seed) for sae, loaded in saes.items()} if settings.baselines else {}
    rows: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {sae: {} for sae in saes}
    for text in encode_texts(lm, saes, texts, activations=settings.baselines):
        for sae, loaded in saes.items():
            for name, codes in _codes(text, sae, loaded, blank.get(sae)):
                rows[sae].setdefault(name, []).append((codes.amax(0), codes.mean(0)))
    return {
        sae: {name: Scores(*(torch.stack(part) for part in zip(*found, strict=True))) for name, found in of.items()}
        for sae, of in rows.items()
    }


def _codes(text: EncodedText, sae: str, loaded: LoadedSae, blank: LoadedSae | None) -> Iterable[tuple[str, Tensor]]:
    yield SAE, text.codes[sae]
    if blank is not None:
        x = text.activations[hook_of(sae, loaded)]
        yield NEURONS, torch.cat([x, -x], dim=1)
        yield UNTRAINED, blank.encode(x)


def _untrained(loaded: LoadedSae, seed: int) -> LoadedSae:
    """An SAE of the same shape with random directions, about the same centre: relu((x - b_dec) @ W_enc)."""
    trained = loaded.module
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(trained.d_sae, trained.d_in, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    centre = trained.b_dec.detach().cpu() if not trained.transcodes else torch.zeros(trained.d_in)
    weights = {"W_enc": rows.T.contiguous(), "b_enc": torch.zeros(trained.d_sae), "W_dec": rows, "b_dec": centre}
    cfg = {"architecture": "standard", "d_in": trained.d_in, "d_sae": trained.d_sae}
    return LoadedSae(module=folded_sae(cfg, weights).eval().requires_grad_(False), cfg=cfg, record=None)


def judge(concept: Concept, scores: Mapping[str, Scores], settings: ConceptSettings) -> dict[str, Any]:
    """What stands in the JSON of one SAE and one concept; scores: texts of the concept first, then its controls."""
    ranked, held = _split(concept, settings.seed)
    groups = {name: _judge_group(concept, found, ranked, held, settings) for name, found in scores.items()}
    return {
        "v": VERSION,
        "concept": concept.name,
        "created": lineage.now(),
        "texts": len(concept.texts),
        "controls": len(concept.controls),
        "controls_are": concept.source,
        "settings": {"top_features": settings.top_features, "seed": settings.seed, "shuffles": settings.shuffles},
        "held_out_texts": int(held.sum()),
        **groups,
        "better_than": [name for name in BASELINES if name in groups and _compare(groups, name) > 0],
        "verdict": _verdict(groups),
    }


def _split(concept: Concept, seed: int) -> tuple[Tensor, Tensor]:
    """Masks [texts + controls] of the half that ranks and the half that judges; pairs stay together."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(concept.texts), generator=generator) < len(concept.texts) / 2
    same = (
        first
        if concept.paired
        else torch.randperm(len(concept.controls), generator=generator) < len(concept.controls) / 2
    )
    ranked = torch.cat([first, same])
    return ranked, ~ranked


def _judge_group(
    concept: Concept, scores: Scores, ranked: Tensor, held: Tensor, settings: ConceptSettings
) -> dict[str, Any]:
    positive = torch.arange(len(ranked)) < len(concept.texts)
    before = separation(scores.max[ranked], positive[ranked])
    top = before.auroc.argsort(descending=True, stable=True)[: settings.top_features]
    after = separation(scores.max[held][:, top], positive[held])
    by_mean = separation(scores.mean[held][:, top], positive[held])
    whole = separation(scores.max, positive)
    p_family = family_wise(
        scores.max[held],
        positive[held],
        paired=concept.paired,
        shuffles=settings.shuffles,
        seed=settings.seed,
        features=top,
    )
    everywhere = family_wise(
        scores.max, positive, paired=concept.paired, shuffles=settings.shuffles, seed=settings.seed
    )
    rows = [_row(int(f), i, before, after, by_mean, whole, p_family, everywhere) for i, f in enumerate(top)]
    return {
        "features": rows,
        "auroc_held_out": float(after.auroc.mean()),
        "auroc_error": _error(scores.max[held][:, top], positive[held]),
        "passing": sum(row["passes"] for row in rows),
        "significant_q05": int((whole.q < 0.05).sum()),
        "significant_family_wise": int((everywhere < PASSES).sum()),
    }


def _row(
    feature: int,
    place: int,
    before: Separation,
    after: Separation,
    by_mean: Separation,
    whole: Separation,
    p_family: Tensor,
    everywhere: Tensor,
) -> dict[str, Any]:
    return {
        "feature": feature,
        "auroc_ranking": float(before.auroc[feature]),
        "auroc": float(after.auroc[place]),
        "effect": float(after.effect[place]),
        "p": float(after.p[place]),
        "auroc_mean": float(by_mean.auroc[place]),
        "effect_mean": float(by_mean.effect[place]),
        "q_all_texts": float(whole.q[feature]),
        "family_wise_p": float(p_family[place]),
        "family_wise_p_all_texts": float(everywhere[feature]),
        "passes": bool(p_family[place] < PASSES),
    }


def _error(scores: Tensor, positive: Tensor, resamples: int = 200) -> float:
    """Standard error of the mean AUROC of these features, by the bootstrap over texts."""
    generator = torch.Generator().manual_seed(0)
    a, b = positive.nonzero().flatten(), (~positive).nonzero().flatten()
    drawn = [part[torch.randint(len(part), (len(part), resamples), generator=generator)] for part in (a, b)]
    again = scores[torch.cat(drawn)]  # [texts, resamples, features]
    areas = auroc(again.flatten(1), torch.arange(len(again)) < len(a)).view(resamples, -1)
    return float(areas.mean(1).std())


def _compare(groups: Mapping[str, Mapping[str, Any]], name: str) -> int:
    """1 where the SAE's held-out AUROC is above that of a baseline by two standard errors, -1 where below, else 0."""
    mine, other = groups[SAE], groups[name]
    difference = mine["auroc_held_out"] - other["auroc_held_out"]
    error = (mine["auroc_error"] ** 2 + other["auroc_error"] ** 2) ** 0.5
    return (difference > 2 * error) - (difference < -2 * error)


def _verdict(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether the SAE's features tell more than what was not trained, in words."""
    sae = groups[SAE]
    mine = f"top features of the SAE: held-out AUROC {sae['auroc_held_out']:.3f}"
    others = [name for name in BASELINES if name in groups]
    if not others:
        return f"{mine}; nothing to compare it with (baselines were left out)."
    told = {1: "better than", 0: "no better than", -1: "worse than"}
    words = []
    for name in others:
        scored = groups[name]["auroc_held_out"]
        words.append(f"{told[_compare(groups, name)]} the {BASELINES[name]} ({scored:.3f})")
    return f"{mine} +- {sae['auroc_error']:.3f}, {' and '.join(words)}."


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """As it stands in the store."""
    return (json.dumps(document, indent=1) + "\n").encode()
