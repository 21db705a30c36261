"""Shared features against closed forms and the Hungarian match; pairs of a grid against their definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from midiscover import stability
from midiscover.neighbours import chosen, neighbours
from midiscover.stability import MATCH, agreement, best_cosines, pair_row


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_permuted_copy_agrees_fully() -> None:
    a = unit(100, 32)
    found = agreement(a, a[torch.randperm(100)])
    assert (found.matched_a, found.matched_b, found.matched) == (1, 1, 1)
    assert found.cosine == pytest.approx(1, abs=1e-6)


def test_random_directions_share_nothing() -> None:
    """In 256 dimensions a cosine has a standard deviation of 1/16: 0.7 is eleven of them."""
    found = agreement(unit(500, 256), unit(500, 256, seed=1))
    assert found.matched == 0
    assert found.cosine is not None
    assert 0 < found.cosine < 0.4


def test_half_shared_is_a_half_and_the_directions_differ_with_the_widths() -> None:
    a, b = unit(200, 128), unit(200, 128, seed=1)
    assert agreement(a, torch.cat([a[:100], b[:100]])).matched == 0.5
    wide = agreement(a, torch.cat([a, b]))
    assert (wide.matched_a, wide.matched_b, wide.matched) == (1, 0.5, 0.75)


def test_a_turned_feature_matches_as_long_as_its_cosine_does() -> None:
    a = torch.eye(4)
    for cosine, matched in ((MATCH + 1e-4, 1), (MATCH - 1e-4, 0), (-1.0, 0)):
        # Each row turned towards a dimension that no row of A has.
        turned = torch.cat([cosine * torch.eye(4), (1 - cosine**2) ** 0.5 * torch.eye(4)], 1)
        found = agreement(torch.cat([a, torch.zeros(4, 4)], 1), turned)
        assert found.matched == matched
    assert found.cosine == 0  # the best of -1 and three right angles


def test_dead_features_count_on_neither_side() -> None:
    a, b = unit(60, 128), unit(60, 128, seed=1)
    both = torch.cat([a[:30], b[:30]])
    live = torch.arange(60) < 30
    assert agreement(a, both, live, None).matched_a == 1
    assert agreement(a, both, None, ~live).matched == 0
    assert agreement(a, both, live & False, None).matched is None
    assert agreement(a, both, live & False, None).cosine is None


@pytest.mark.parametrize("elements", [1, 130, 1 << 20])
def test_blocks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "BLOCK_ELEMENTS", elements)
    a, b = unit(37, 8), unit(53, 8, seed=1)
    best_a, best_b = best_cosines(a, b)
    naive = a @ b.T
    torch.testing.assert_close(best_a, naive.amax(1))
    torch.testing.assert_close(best_b, naive.amax(0))


@pytest.mark.parametrize("seed", range(5))
def test_best_partners_match_at_least_what_the_hungarian_algorithm_does(seed: int) -> None:
    """Equal where noise keeps partners apart, and never below it, as a one-to-one match may lose a shared partner."""
    a = unit(80, 64, seed=seed)
    noisy = torch.nn.functional.normalize(a + 0.09 * torch.randn(80, 64, generator=torch.Generator().manual_seed(seed)))
    for b in (noisy[torch.randperm(80)], torch.cat([noisy[:50], unit(30, 64, seed=seed + 99)])):
        cosines = a @ b.T
        rows, columns = linear_sum_assignment(-cosines.numpy())
        hungarian = float((cosines[rows, columns] >= MATCH).double().mean())
        assert agreement(a, b).matched == pytest.approx(hungarian)
        assert 0 < hungarian <= 1
    crowded = torch.cat([a[:40], noisy[:40]])  # two of B for one of A
    cosines = a @ crowded.T
    rows, columns = linear_sum_assignment(-cosines.numpy())
    found = agreement(a, crowded)
    assert found.matched_b == 1
    assert found.matched is not None
    assert found.matched >= float((cosines[rows, columns] >= MATCH).double().mean())


def row(**changes: Any) -> dict[str, Any]:
    base = {"hook": "h.1.mlp", "output_hook": "h.1.mlp", "layer": 1, "kind": "topk", "control": "none"}
    settings = {"sparsity_label": "k 32", "l1": None, "k": 32, "target_l0": None, "d_in": 8, "d_sae": 64, "seed": 0}
    whole = base | settings | changes
    whole["sparsity_label"] = changes.get("sparsity_label", f"k {whole['k']}")
    return whole | {"sae_id": " ".join(str(value) for value in whole.values())}


GRID = [
    row(hook=hook, output_hook=hook, kind=kind, k=k, d_sae=width, seed=seed)
    for hook, kind, k, width, seed in itertools.product(
        ("h.1.mlp", "h.2.mlp"), ("topk", "batchtopk"), (64, 16, 32), (64, 128), (0, 1)
    )
]
AXES = {"seed": "seed", "sparsity": "k", "kind": "kind", "width": "d_sae"}


def test_neighbours_differ_in_one_setting_and_are_next_to_one_another() -> None:
    pairs = neighbours(GRID)
    for pair in pairs:
        different = {name for name in pair.a if pair.a[name] != pair.b[name]} - {"sae_id", "sparsity_label"}
        assert different == {AXES[pair.axis]}
    counts = {axis: sum(pair.axis == axis for pair in pairs) for axis in AXES}
    # 48 SAEs: 24 pairs of two seeds, kinds and widths each; of three k, two steps in each of 16 lines.
    assert counts == {"seed": 24, "sparsity": 32, "kind": 24, "width": 24}
    assert {(pair.a["k"], pair.b["k"]) for pair in pairs if pair.axis == "sparsity"} == {(16, 32), (32, 64)}
    assert len({(pair.a["sae_id"], pair.b["sae_id"]) for pair in pairs}) == len(pairs)
    assert [pair.axis for pair in neighbours(GRID[::-1])] == [pair.axis for pair in pairs]


def test_three_seeds_make_three_pairs() -> None:
    assert len(neighbours([row(seed=seed) for seed in range(3)])) == 3


def test_an_l1_and_a_k_are_no_neighbours() -> None:
    standard = row(kind="standard", k=None, l1=32.0, sparsity_label="l1 32")
    steered = row(kind="standard", k=None, target_l0=32.0, sparsity_label="L0 32")
    assert neighbours([row(), standard, steered]) == []


def test_transcoders_stand_apart_from_saes_of_their_input() -> None:
    assert neighbours([row(), row(kind="batchtopk", output_hook="h.2.mlp")]) == []


def test_controls_are_compared_with_what_was_trained_only() -> None:
    controls = [row(control=name) for name in ("neurons", "frozen_decoder", "random_model", "untrained")]
    pairs = neighbours([*controls, row(), row(seed=1, control="untrained")])
    assert {(pair.axis, pair.a["control"], pair.b["control"]) for pair in pairs} == {
        ("control", "none", "frozen_decoder"),
        ("control", "none", "untrained"),
    }


def test_pairs_have_the_same_variant() -> None:
    rows = [row(seed=seed, variant=f"lr {rate}") for rate, seed in itertools.product((1, 2), (0, 1))]
    pairs = neighbours(rows)
    assert [(pair.axis, pair.a["variant"], pair.b["variant"]) for pair in pairs] == [
        ("seed", "lr 1", "lr 1"),
        ("seed", "lr 2", "lr 2"),
    ]
    found = pair_row(pairs[1], agreement(torch.eye(4), torch.eye(4)), (4, 4))
    assert found["setting"] == "topk 64 k 32 lr 2"


def test_a_control_is_held_against_its_variant_or_else_against_every_one() -> None:
    def compared(*variants: str) -> list[tuple[str, str]]:
        trained = [row(variant=f"decoder free, lr {rate}") for rate in (1, 2)]
        pairs = neighbours([*trained, *(row(variant=name, control="frozen_decoder") for name in variants)])
        assert {(pair.axis, pair.a["control"], pair.b["control"]) for pair in pairs} == {
            ("control", "none", "frozen_decoder")
        }
        return [(pair.a["variant"][-4:], pair.b["variant"]) for pair in pairs]

    both = ["decoder free, lr 1", "decoder free, lr 2"]
    assert compared(*both) == [(name[-4:], name) for name in both]
    for name in ("decoder free", "", "decoder free, lr null"):
        assert compared(name) == [("lr 1", name), ("lr 2", name)]


def test_an_architecture_without_a_setting_is_compared_with_each_of_its_values() -> None:
    gated = [row(kind="gated", variant=name) for name in ("lr 1", "lr 2")]
    standard = [row(kind="standard", variant=f"decoder {d}, lr {rate}") for d in "ab" for rate in (1, 2)]
    pairs = neighbours([*gated, *standard])
    assert [(pair.axis, pair.a["variant"], pair.b["variant"]) for pair in pairs] == [
        ("kind", f"lr {rate}", f"decoder {d}, lr {rate}") for rate in (1, 2) for d in "ab"
    ]
    found = pair_row(pairs[-1], agreement(torch.eye(4), torch.eye(4)), (4, 4))
    assert found["setting"] == "64 k 32 seed 0 decoder b, lr 2"
    frozen = row(variant="lr null, or another", control="frozen_decoder")
    [control] = neighbours([row(variant="lr 1"), frozen])
    assert pair_row(control, agreement(torch.eye(4), torch.eye(4)), (4, 4))["setting"] == "topk 64 k 32 seed 0 lr 1"


def test_an_architecture_that_leaves_out_a_setting_which_it_has_is_no_neighbour() -> None:
    """Its learning rate may be a third one; AuxK is BatchTopK's as well, and only it has a decaying threshold."""

    def compared(topk: str, batchtopk: str) -> int:
        return len(neighbours([row(variant=topk), row(kind="batchtopk", variant=batchtopk)]))

    assert compared("lr 1", "") == compared("", "lr 1") == compared("auxk_coefficient 1", "") == 0
    assert compared("lr 1", "threshold_decay 0.9") == compared("lr 1", "lr 2, threshold_decay 0.9") == 0
    assert compared("", "threshold_decay 0.9") == compared("lr 1", "lr 1, threshold_decay 0.9") == 1
    assert neighbours([row(kind="standard", variant=name) for name in ("", "resample_at [0.3,0.6]")]) == []


def test_saes_that_differ_in_something_else_count_once() -> None:
    """Rows that tell no variant: which pairs differ in the seed alone can't be seen from them."""
    rows = [row(seed=seed) | {"sae_id": f"{rate} {seed}"} for rate, seed in itertools.product((1, 2), (0, 1))]
    assert [(pair.a["sae_id"], pair.b["sae_id"]) for pair in neighbours(rows)] == [("1 0", "1 1")]


@pytest.mark.parametrize(
    ("most", "seeds", "others"), [(200, 24, 80), (40, 24, 16), (24, 24, 0), (10, 10, 0), (0, 0, 0)]
)
def test_seeds_come_first_where_there_is_no_room(most: int, seeds: int, others: int) -> None:
    found = chosen(neighbours(GRID), most)
    axes = [pair.axis for pair in found]
    assert (axes.count("seed"), len(axes) - axes.count("seed")) == (seeds, others)
    if others:
        assert all(axes.count(axis) >= min(24, others // 3) for axis in ("sparsity", "kind", "width"))
    if seeds == 10:
        assert {pair.a["hook"] for pair in found} == {"h.1.mlp", "h.2.mlp"}


def test_a_pair_as_a_row_names_what_differs_and_what_does_not() -> None:
    [pair] = neighbours([row(seed=0), row(seed=1)])
    found = pair_row(pair, agreement(torch.eye(4), torch.eye(4)[:2]), (4, 2))
    assert (found["a_value"], found["b_value"], found["setting"]) == ("seed 0", "seed 1", "topk 64 k 32")
    assert (found["matched_a"], found["matched_b"], found["matched"]) == (0.5, 1, 0.75)
    [pair] = neighbours([row(k=64), row(k=32)])
    found = pair_row(pair, agreement(torch.eye(4), torch.eye(4)), (4, 4))
    assert (found["a_value"], found["b_value"], found["setting"]) == ("k 32", "k 64", "topk 64 seed 0")
