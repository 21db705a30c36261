"""What an imported SAE is said to have been trained with: what its source tells, and no default of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from midiscover.configio import to_tree
from midiscover.errors import UserError
from midiscover.ids import recorded_settings, sparsity_label
from midiscover.publish.importers import Foreign, read_saelens
from midiscover.sae.registry import folded_sae
from tests.unit.publish.test_importers import D_IN, D_SAE, K, X, apart, by_hand, random_weights, write_saelens

# The details as SAELens 6.54.12 writes them, of each kind whose name we share.
TOPK = {"decoder_init_norm": 0.1, "use_sparse_activations": False, "aux_loss_coefficient": 1.0}
BATCHTOPK = TOPK | {"k": 10, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01}
MATRYOSHKA = BATCHTOPK | {"matryoshka_widths": [16, 64], "use_matryoshka_aux_loss": False}
L1 = {"decoder_init_norm": 0.1, "l1_coefficient": 2.0, "l1_warm_up_steps": 0}
JUMPRELU = {
    "decoder_init_norm": 0.1,
    "jumprelu_init_threshold": 0.01,
    "jumprelu_bandwidth": 0.05,
    "jumprelu_sparsity_loss_mode": "step",
    "l0_coefficient": 3.0,
    "l0_warm_up_steps": 0,
    "pre_act_loss_coefficient": None,
    "target_l0": None,
}


def read(folder: Path, architecture: str, kind: str, details: Any, **cfg: Any) -> Foreign:
    """An SAE as SAELens saves what it trained as `kind`."""
    about = {"training_architecture": kind, "training_architecture_details": details, "sae_lens_version": "6.54.12"}
    return read_saelens(write_saelens(folder, architecture, random_weights(architecture), metadata=about, **cfg))


def told(foreign: Foreign) -> dict[str, Any]:
    """The settings as they stand in a record, but for those that say nothing of the training."""
    tree = {name: value for name, value in to_tree(foreign.settings).items() if name in foreign.known}
    assert recorded_settings(tree) == foreign.settings
    return {name: value for name, value in tree.items() if name not in ("d_sae", "control", "expansion_factor")}


def test_a_topk_sae_that_saelens_trained_keeps_its_k_features(tmp_path: Path) -> None:
    """Its k stands in cfg.json and not in the details, since the SAE in use has it as well."""
    foreign = read(tmp_path, "topk", "topk", TOPK, rescale_acts_by_decoder_norm=True)
    cfg = {"architecture": foreign.architecture, "d_in": D_IN, "d_sae": D_SAE, **to_tree(foreign.settings)}
    with torch.no_grad():
        features = folded_sae(cfg, foreign.weights).encode(X)
    naive, _ = by_hand("topk", random_weights("topk"), X, apply=True, rescale=True)
    assert int((naive > 0).sum(1).max()) == K
    assert apart(features, naive) < 1e-6
    assert told(foreign) == {"kind": "topk", "k": K}


@pytest.mark.parametrize(
    ("architecture", "kind", "details", "expected", "label"),
    [
        ("jumprelu", "batchtopk", BATCHTOPK, {"k": 10}, "k 10"),
        ("jumprelu", "batchtopk", BATCHTOPK | {"k": 10.0}, {"k": 10}, "k 10"),
        ("jumprelu", "matryoshka_batchtopk", MATRYOSHKA, {"k": 10}, "k 10"),
        ("jumprelu", "jumprelu", JUMPRELU, {"l0_coefficient": 3.0, "target_l0": None}, "l0c 3"),
        ("standard", "standard", L1 | {"lp_norm": 1.0}, {"l1_coefficient": 2.0}, "l1 2"),
        ("gated", "gated", L1, {"l1_coefficient": 2.0}, "l1 2"),
        ("transcoder", "transcoder", L1, {"l1_coefficient": 2.0, "output_hook": None}, "l1 2"),
        # A sparsity that is not told is 0, and none of ours.
        ("standard", "standard", {"decoder_init_norm": 0.1}, {"l1_coefficient": 0.0}, "l1 0"),
        ("standard", "standard", None, {"l1_coefficient": 0.0}, "l1 0"),
        ("jumprelu", "jumprelu", {"jumprelu_bandwidth": 0.05}, {"l0_coefficient": 0.0}, "l0c 0"),
    ],
)
def test_only_what_the_source_tells_is_recorded(
    tmp_path: Path, architecture: str, kind: str, details: Any, expected: dict[str, Any], label: str
) -> None:
    foreign = read(tmp_path, architecture, kind, details)
    assert told(foreign) == {"kind": kind} | expected
    assert all(type(value) is type(expected[name]) for name, value in told(foreign).items() if name != "kind")
    assert sparsity_label(foreign.settings) == label
    # Its own words stay as they are, for the record and for whoever it is exported to.
    assert foreign.about.get("training_architecture_details") == details
    assert foreign.trained_as == {"training_architecture": kind, "training_architecture_details": details or {}}


@pytest.mark.parametrize("details", [TOPK, BATCHTOPK | {"k": 30.5}])
def test_a_batchtopk_sae_without_a_whole_k_is_what_its_weights_are(tmp_path: Path, details: dict[str, Any]) -> None:
    foreign = read(tmp_path, "jumprelu", "batchtopk", details)
    assert told(foreign) == {"kind": "jumprelu", "l0_coefficient": 0.0}
    assert foreign.trained_as["training_architecture"] == "batchtopk"


@pytest.mark.parametrize("k", [30.5, 0, "4", True])
def test_a_k_that_is_no_count_is_refused(tmp_path: Path, k: Any) -> None:
    with pytest.raises(UserError, match=rf"k is {k!r} in .*; a whole number above 0 is needed"):
        read(tmp_path / "topk", "topk", "topk", TOPK, k=k)
