"""Texts through features: how high each fires in each text, beside neurons, random directions and the SAE as it began.

One forward pass of the texts serves all SAEs and what stands beside them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midiscover.features.modules import DIRECTIONS, LENGTH, NEURONS, SAE, UNTRAINED
from midiscover.ids import recorded_seed, recorded_settings
from midiscover.interpret import ENCODED_TOKENS, batches, encode_texts, hook_of
from midiscover.lm import LanguageModel
from midiscover.sae.base import Sae
from midiscover.sae.registry import make_sae
from midiscover.saes import LoadedSae

CALIBRATION_TOKENS = 2048
"""Tokens at most that set the biases or thresholds of an untrained SAE."""
LATER = (
    *("expansion_factor", "d_sae", "control", "target_l0", "l1_coefficient", "l0_coefficient", "bandwidth"),
    *("auxk_coefficient", "k_aux", "threshold_decay", "prefixes"),
)
"""Settings that change nothing before the first step, the width's own apart."""


class Scores(NamedTuple):
    """What features make of texts, [texts, features]."""

    max: Tensor
    """Highest activation, float32."""
    mean: Tensor
    """Mean activation over all tokens of the text, float32."""
    peak: Tensor | None = None
    """Position of the highest one; None where nobody asks for it."""


class ScoredTexts(NamedTuple):
    """Scores of the same texts by several SAEs."""

    tokens: list[list[str]]
    """Of each text."""
    of: dict[str, dict[str, Scores]]
    """SAE -> `sae_scores`, and, where asked for, the baselines. SAEs whose baseline is the same share it as one
    object."""


def score_texts(
    lm: LanguageModel, saes: Mapping[str, LoadedSae], texts: Sequence[str], *, baselines: bool = True
) -> ScoredTexts:
    """Score texts by the features of SAEs of one language model. Errors as of `interpret.encode_texts`."""
    tokens: list[list[str]] = []
    found: dict[str, list[Scores]] = {sae: [] for sae in saes}
    rows: dict[str, list[Tensor]] = {}
    for text in encode_texts(lm, saes, texts, activations=baselines):
        tokens.append(text.tokens)
        for sae, codes in text.codes.items():
            found[sae].append(_of_text(codes, with_peak=True))
        for hook, x in text.activations.items():
            rows.setdefault(hook, []).append(x)
    of = {sae: {SAE: _stacked(parts)} for sae, parts in found.items()}
    if baselines:
        _add_baselines(of, saes, rows)
    return ScoredTexts(tokens, of)


def _add_baselines(
    of: dict[str, dict[str, Scores]], saes: Mapping[str, LoadedSae], rows: Mapping[str, Sequence[Tensor]]
) -> None:
    neurons = {hook: neuron_scores(texts) for hook, texts in rows.items()}
    tokens = torch.tensor([[len(x)] for x in next(iter(rows.values()))], dtype=torch.float32)
    lengths = Scores(tokens, tokens)
    untrained: dict[tuple[object, ...], dict[str, Scores]] = {}
    for sae, loaded in saes.items():
        hook, settings, module = hook_of(sae, loaded), _settings(loaded), loaded.module
        seed = recorded_seed(loaded.record or {}) or 0
        key = (hook, seed, module.d_sae, module.d_out, *_at_first(settings))
        if key not in untrained:
            began = as_it_began(loaded, torch.cat(list(rows[hook])), seed)
            untrained[key] = {
                DIRECTIONS: began.scores(rows[hook], activated=False),
                UNTRAINED: began.scores(rows[hook], activated=True),
            }
        of[sae] |= {NEURONS: neurons[hook], **untrained[key], LENGTH: lengths}


def neuron_scores(texts: Sequence[Tensor]) -> Scores:
    """The hook's own dimensions as 2 * d_in features, x and then -x; texts: [tokens, d_in] each."""
    return _stacked([_of_text(torch.cat([x, -x], dim=1)) for x in texts])


class Began(NamedTuple):
    """An SAE before its first step, on inputs x' = scale * (x - mean)."""

    sae: Sae
    mean: Tensor
    scale: float

    def scores(self, texts: Sequence[Tensor], *, activated: bool) -> Scores:
        """Of texts [tokens, d_in] each: of its features, or of the directions of its encoder alone."""

        def codes(rows: Tensor) -> Tensor:
            x = self.scale * (rows - self.mean)
            with torch.no_grad():
                return self.sae.encode(x) if activated else x @ self.sae.W_enc

        return encoded_scores(codes, texts)


def encoded_scores(encode: Callable[[Tensor], Tensor], texts: Sequence[Tensor], *, with_peak: bool = False) -> Scores:
    """Of texts [tokens, d_in] each, by the features that `encode` finds in rows [tokens, d_in] of theirs."""
    found = []
    for places in batches([len(rows) for rows in texts], ENCODED_TOKENS):
        part = [texts[place] for place in places]
        codes = encode(torch.cat(part)).float().cpu()
        found += [_of_text(code, with_peak=with_peak) for code in codes.split([len(rows) for rows in part])]
    return _stacked(found)


def as_it_began(loaded: LoadedSae, rows: Tensor, seed: int) -> Began:
    """The SAE as its training initialised it, `sae.control: untrained`: random directions, calibrated on `rows`.

    rows: [tokens, d_in] of the hook, which give the mean, the scale and, at most CALIBRATION_TOKENS of them, evenly
    spread, the biases or thresholds.
    """
    module = loaded.module
    sae = make_sae(_settings(loaded), module.d_in, module.d_sae, module.d_out)
    sae.initialise_(seed)
    mean = rows.mean(0)
    scale = math.sqrt(module.d_in) / float((rows - mean).norm(dim=1).mean().clamp(min=1e-8))
    sae.uncentre_(scale * mean)
    sample = rows[:: math.ceil(len(rows) / CALIBRATION_TOKENS)]
    sae.calibrate_(scale * (sample - mean))
    return Began(sae.eval().requires_grad_(False), mean, scale)


def _of_text(codes: Tensor, *, with_peak: bool = False) -> Scores:
    """Of one text, codes [tokens, features]: each [features]."""
    # By numpy: a few tokens are too little work for torch's threads, which wait for one another a thousand times.
    rows = codes.numpy()
    peak = torch.from_numpy(rows.argmax(axis=0).astype("int32")) if with_peak else None
    return Scores(torch.from_numpy(rows.max(axis=0)), torch.from_numpy(rows.mean(axis=0)), peak)


def _stacked(texts: Sequence[Scores]) -> Scores:
    peaks = [text.peak for text in texts if text.peak is not None]
    highest, mean = torch.stack([text.max for text in texts]), torch.stack([text.mean for text in texts])
    return Scores(highest, mean, torch.stack(peaks) if peaks else None)


def _settings(loaded: LoadedSae) -> Any:
    """Those it was trained under; for one of another origin, those that its cfg.json tells."""
    try:
        return recorded_settings((loaded.record or {})["sae"])
    except (KeyError, TypeError, ValueError):
        return loaded.module.config


def _at_first(settings: Any) -> list[tuple[str, str]]:
    """What sets two SAEs of one width and seed apart before the first step: not l1, for example."""
    fields = dataclasses.fields(settings)
    return [(item.name, repr(getattr(settings, item.name))) for item in fields if item.name not in LATER]
