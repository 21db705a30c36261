"""Shuffled weights: the same values in other places, the same on every run."""

from __future__ import annotations

from pathlib import Path

import torch

from midiscover.config import ModelConfig
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.shuffled import shuffle_weights_
from tests.tiny import make_tiny_model


def test_every_matrix_keeps_its_values_and_loses_their_places(tmp_path: Path) -> None:
    identity = resolve_model(ModelConfig(id=str(make_tiny_model("llama", tmp_path / "model"))))
    plain, one, two = (LanguageModel.load(identity, dtype="float32") for _ in range(3))
    shuffle_weights_(one.model)
    shuffle_weights_(two.model)
    shuffled = dict(one.model.named_parameters())
    again = dict(two.model.named_parameters())
    for name, before in plain.model.named_parameters():
        assert torch.equal(shuffled[name], again[name])
        assert torch.equal(shuffled[name].flatten().sort().values, before.flatten().sort().values)
        assert torch.equal(shuffled[name], before) == (before.ndim < 2)
    ids = torch.arange(12).view(1, 12)
    assert not torch.allclose(one.logits(ids), plain.logits(ids), atol=1e-3)
