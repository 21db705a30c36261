"""Correlations on a sample against numpy's, feature by feature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from midiscover.features import relations
from midiscover.features.relations import Relations
from midiscover.features.sample import Sample

ROWS, D_SAE, D_IN = 300, 41, 9
DEAD, STEADY, CONSTANT = 4, 17, 3


def sample_of(codes: torch.Tensor, inputs: torch.Tensor) -> Sample:
    row, feature = codes.nonzero().unbind(1)
    state = {"row": row.int(), "feature": feature.int(), "value": codes[row, feature]}
    return Sample(state | {"numbers": torch.arange(len(codes)), "inputs": inputs})


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, d_sae] and inputs [rows, d_in] bfloat16, two of which move with a feature."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(ROWS, D_SAE, generator=generator)
    codes *= torch.rand(ROWS, D_SAE, generator=generator) < 0.1
    codes[:, 30] = codes[:, 2] + 0.2 * codes[:, 5]
    codes[:, DEAD] = 0
    codes[:, STEADY] = 0.7
    inputs = torch.randn(ROWS, D_IN, generator=generator)
    inputs[:, 1] = 0.1 * inputs[:, 1] + codes[:, 2]
    inputs[:, 6] = 300 + 8 * inputs[:, 6] + 40 * codes[:, 5]  # far from 0
    inputs[:, CONSTANT] = 7.3
    return codes, inputs.bfloat16()


@pytest.fixture(
    params=[(512, 1024, 1.0), (512, 1024, 0.0), (6, 4, 1.0), (6, 4, 0.0)],
    ids=["one block, entries", "one block, dense", "many blocks, entries", "many blocks, dense"],
)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("_SLICE", "_BLOCK", "_DENSE"), request.param, strict=True):
        monkeypatch.setattr(relations, name, value)


def naive(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return float(np.corrcoef(a, b)[0, 1]), float(cosine)


@pytest.mark.usefixtures("_way")
def test_features_and_inputs_are_those_that_numpy_finds(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    codes, inputs = drawn
    found = Relations(sample_of(codes, inputs), D_SAE)
    f64, x64 = codes.double().numpy(), inputs.double().numpy()
    alive = [f for f in range(D_SAE) if f not in (DEAD, STEADY)]
    moving = [d for d in range(D_IN) if d != CONSTANT]
    for related, columns, others in ((found.features(10), f64, alive), (found.inputs(3), x64, moving)):
        k = related.indices.shape[1]
        for f in range(D_SAE):
            if f not in alive:
                assert related.indices[f].tolist() == [-1] * k
                assert related.pearson[f].isnan().all()
                assert related.cosine[f].isnan().all()
                continue
            partners = [g for g in others if columns is x64 or g != f]
            pearson = {g: naive(f64[:, f], columns[:, g])[0] for g in partners}
            assert related.pearson[f].tolist() == pytest.approx(sorted(pearson.values(), reverse=True)[:k], abs=1e-5)
            for g, p, c in zip(*(tensor[f].tolist() for tensor in related), strict=True):
                assert (p, c) == pytest.approx(naive(f64[:, f], columns[:, g]), abs=1e-5)
    assert found.features(10).indices[2, 0] == 30
    assert found.inputs(3).indices[[2, 5], 0].tolist() == [1, 6]


def test_fewer_than_asked_for_and_an_empty_sample() -> None:
    codes = torch.eye(3) + 0.5
    found = Relations(sample_of(codes, torch.randn(3, 2).bfloat16()), 3)
    assert found.features(10).indices.shape == (3, 2)
    assert found.inputs(3).indices.shape == (3, 2)
    nothing = Relations(Sample.empty(2), 3)
    assert all(tensor.shape == (3, 0) for tensor in (*nothing.features(10), *nothing.inputs(3)))
