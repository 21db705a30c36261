"""Weights of other makers that ours never have: taken in exactly, and verified as what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from midiscover.errors import UserError
from midiscover.publish.importers import read_saelens
from midiscover.publish.verify import subject_of_folder, verify
from tests.unit.publish import folders
from tests.unit.publish.breakers import BARE, changed
from tests.unit.publish.test_importers import X, apart, by_hand, module, random_weights, write_saelens
from tests.unit.publish.test_verify import failed

ZERO = "encoder_columns_are_not_zero"


@pytest.mark.parametrize("norm", [2.5, 1 + 5e-6])
def test_topk_whose_rows_have_one_norm_keeps_its_selection(tmp_path: Path, norm: float) -> None:
    weights = random_weights("topk", unit=True)
    weights["W_dec"] *= norm
    sae = module(read_saelens(write_saelens(tmp_path, "topk", weights)))
    features, reconstruction = by_hand("topk", weights, X, apply=True)
    assert apart(sae.encode(X), features) < 1e-6
    assert apart(sae(X), reconstruction) < 1e-6
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)), rtol=0, atol=1e-6)
    assert torch.equal(sae.encode(X) > 0, features > 0)


def test_topk_of_scaled_inputs_keeps_its_selection(tmp_path: Path) -> None:
    weights = random_weights("topk", unit=True)
    folder = write_saelens(tmp_path, "topk", weights, normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.4}))
    features, scaled = by_hand("topk", weights, X * 0.4, apply=True)
    sae = module(read_saelens(folder))
    assert apart(sae.encode(X), features / 0.4) < 1e-6
    assert apart(sae(X), scaled / 0.4) < 1e-6


def test_norms_that_differ_a_little_are_refused_by_what_they_are(tmp_path: Path) -> None:
    weights = random_weights("topk", unit=True)
    weights["W_dec"][3] *= 2.0001
    weights["W_dec"][torch.arange(len(weights["W_dec"])) != 3] *= 2
    with pytest.raises(UserError, match=r"norms from (1\.99999|2\.00000|2)\d* to 2\.000[12]\d*: scaling"):
        read_saelens(write_saelens(tmp_path, "topk", weights))


def test_a_negative_threshold_is_one_of_0(tmp_path: Path) -> None:
    """Features are relu of what passes the threshold."""
    weights = random_weights("jumprelu")
    weights["threshold"] = torch.linspace(-2, 1, len(weights["threshold"]))
    sae = module(read_saelens(write_saelens(tmp_path, "jumprelu", weights)))
    features, reconstruction = by_hand("jumprelu", weights, X, apply=True)
    below = weights["threshold"] < 0
    assert float((features[:, below] > 0).double().mean()) > 0.2
    assert apart(sae.encode(X), features) < 1e-6
    assert apart(sae(X), reconstruction) < 1e-6
    assert bool((sae.state_dict()["threshold"] >= 0).all())


@pytest.fixture(scope="module")
def zeroed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE with an encoder column of zeros, and its export for SAELens."""
    store = tmp_path_factory.mktemp("store")
    folder = folders.write_sae(store)
    folders.add_features(store, folder)
    BARE[ZERO](folder)
    names = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    export = {name: (folder / name).read_bytes() for name in names}
    folders.put_export(folder / "exports" / "saelens", "saelens", export)
    return folder


def test_an_imported_encoder_column_may_be_zero(zeroed: Path) -> None:
    found = verify(subject_of_folder(str(zeroed)), ("weights",))
    assert failed(found) == {ZERO: "feature 4"}
    changed("record.json", "imported", {"from": "saelens"})(zeroed)
    found = verify(subject_of_folder(str(zeroed)), ("weights",))
    assert failed(found) == {}
    assert [outcome.detail for outcome in found.outcomes if outcome.name == ZERO] == ["1 are zero, as they came"]


def test_so_may_that_of_its_export(zeroed: Path) -> None:
    export = zeroed / "exports" / "saelens"
    for made, fails in ((folders.SAE, [ZERO]), ("imp.their-sae.0123456789", [])):
        changed("cfg.json", "metadata.midiscover_id", made)(zeroed)
        (export / "cfg.json").write_bytes((zeroed / "cfg.json").read_bytes())
        assert list(failed(verify(subject_of_folder(str(export)), ("weights",)))) == fails
