"""What queries find in activations, against a loop over features and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from midiscover.errors import UserError
from midiscover.sae.registry import make_sae
from midiscover.saeconfig import StandardConfig
from midiscover.saes import LoadedSae
from serve.answers import ROWS, answer_query
from serve.exchange import Query

D_IN, D_SAE = 8, 40


@pytest.fixture(scope="module")
def sae() -> LoadedSae:
    module = make_sae(StandardConfig(l1_coefficient=1.0), D_IN, D_SAE, D_IN)
    module.initialise_(3)
    with torch.no_grad():
        module.b_enc.sub_(0.3)
    return LoadedSae(module=module.requires_grad_(False), cfg={}, record=None)


def rows(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(tokens))


def codes_of(sae: LoadedSae, x: torch.Tensor) -> list[list[float]]:
    """One token at a time."""
    return [sae.encode(row[None])[0].tolist() for row in x]


@pytest.mark.parametrize("tokens", [1, 7, ROWS + 3])
def test_the_strongest_of_each_token_and_of_the_text(sae: LoadedSae, tokens: int) -> None:
    x = rows(tokens)
    naive = codes_of(sae, x)
    found = answer_query(Query(sae="s", k=4), sae, x)
    expected = []
    for token, code in enumerate(naive):
        best = sorted((-value, feature) for feature, value in enumerate(code) if value > 0)[:4]
        expected += [(token, feature, -value) for value, feature in best]
    got = list(zip(found.token.tolist(), found.feature.tolist(), found.value.tolist(), strict=True))
    assert [(token, feature) for token, feature, _ in got] == [(token, feature) for token, feature, _ in expected]
    assert [value for *_, value in got] == pytest.approx([value for *_, value in expected], rel=1e-5)
    maxima = {feature: max(code[feature] for code in naive) for feature in range(D_SAE)}
    strongest = sorted((feature for feature in maxima if maxima[feature] > 0), key=lambda f: (-maxima[f], f))[:4]
    assert found.strongest.tolist() == strongest
    by_hand = np.array([[code[feature] for code in naive] for feature in strongest])
    assert found.values == pytest.approx(by_hand, rel=1e-5, abs=1e-6)
    assert found.mean == pytest.approx(by_hand.mean(1), rel=1e-4)
    alone = answer_query(Query(sae="s", k=4, per_text=False), sae, x)
    assert alone.token.tolist() == found.token.tolist()
    assert (len(alone.strongest), alone.values.shape) == (0, (0, tokens))


def test_ranked_by_the_sum_over_some_tokens(sae: LoadedSae) -> None:
    x = rows(9)
    naive = codes_of(sae, x)
    found = answer_query(Query(sae="s", k=5, rank_at=(2, 5), per_token=False), sae, x)
    sums = {feature: naive[2][feature] + naive[5][feature] for feature in range(D_SAE)}
    assert found.strongest.tolist() == sorted((f for f in sums if sums[f] > 0), key=lambda f: (-sums[f], f))[:5]
    assert len(found.token) == 0
    with pytest.raises(UserError, match="no token 9; the text has 9"):
        answer_query(Query(sae="s", rank_at=(9,)), sae, x)


def test_all_that_fire_and_those_asked_for(sae: LoadedSae) -> None:
    x = rows(6)
    naive = codes_of(sae, x)
    found = answer_query(Query(sae="s", kind="active", skip_first=True), sae, x)
    entries = {
        (t, f): v for t, f, v in zip(found.token.tolist(), found.feature.tolist(), found.value.tolist(), strict=True)
    }
    expected = {(t, f): v for t, code in enumerate(naive) for f, v in enumerate(code) if v > 0 and t > 0}
    assert entries.keys() == expected.keys()
    assert entries == pytest.approx(expected, rel=1e-5)
    found = answer_query(Query(sae="s", kind="values", features=(7, 0, 7)), sae, x)
    assert found.values.tolist() == pytest.approx(np.array([[code[f] for code in naive] for f in (7, 0, 7)]), rel=1e-5)
    with pytest.raises(UserError, match="no feature 40"):
        answer_query(Query(sae="s", kind="values", features=(40,)), sae, x)


def test_a_direction_is_a_dot_product() -> None:
    x = rows(5)
    vector = tuple(float(i) for i in range(D_IN))
    found = answer_query(Query(hook="h", vector=vector), None, x)
    assert found.values[0] == pytest.approx((x * torch.tensor(vector)).sum(1).numpy(), rel=1e-5)
    with pytest.raises(UserError, match="The vector has 3 numbers; 'h' has 8"):
        answer_query(Query(hook="h", vector=(1, 2, 3)), None, x)


def test_of_equal_features_the_first_come_first() -> None:
    module = make_sae(StandardConfig(l1_coefficient=1.0), 2, 6, 2)
    with torch.no_grad():
        module.W_enc.copy_(torch.tensor([[1.0, 2, 1, 2, 1, 1], [0, 0, 0, 0, 0, 0]]))
        module.b_enc.zero_()
        module.b_dec.zero_()
    sae = LoadedSae(module=module.requires_grad_(False), cfg={}, record=None)
    assert answer_query(Query(sae="s", k=4), sae, torch.tensor([[1.0, 0.0]])).strongest.tolist() == [1, 3, 0, 2]
