"""SAEs of other makers against the plain formulas of their makers, and ours after they have been abroad."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from midiscover import load_sae
from midiscover.errors import CorruptError, MiDiscoverError, NotFoundError, UserError
from midiscover.publish.importers import Foreign, read_checkpoint, read_saelens, read_seed
from midiscover.sae.base import Sae
from midiscover.sae.registry import FOLDED, folded_sae
from midiscover.saeconfig import BatchTopKConfig, StandardConfig, TopKConfig
from tests.unit.publish import folders

D_IN, D_SAE, D_OUT, K = 12, 30, 7, 4
Weights = dict[str, Tensor]


def random_weights(architecture: str, *, unit: bool = False, seed: int = 0) -> Weights:
    """Decoder rows of very different norms, biases far from 0."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    d_out = D_OUT if architecture.endswith("transcoder") else D_IN
    decoder = normal(D_SAE, d_out) * torch.linspace(0.2, 5, D_SAE)[:, None]
    weights = {
        "W_enc": normal(D_IN, D_SAE) / D_IN**0.5,
        "b_enc": normal(D_SAE) / 2,
        "W_dec": decoder / decoder.norm(dim=1, keepdim=True) if unit else decoder,
        "b_dec": normal(d_out),
    }
    if architecture == "gated":
        del weights["b_enc"]
        weights |= {"b_gate": normal(D_SAE) / 2, "b_mag": normal(D_SAE) / 2, "r_mag": normal(D_SAE) / 3}
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(D_SAE, generator=draw)
    if architecture == "skip_transcoder":
        weights["W_skip"] = normal(d_out, D_IN)
    return weights


def by_hand(architecture: str, w: Weights, x: Tensor, *, apply: bool, rescale: bool = False) -> tuple[Tensor, Tensor]:
    """SAELens' formulas (features after its folding of decoder norms, and the reconstruction), in float64."""
    w = {name: value.double() for name, value in w.items()}
    norms, x = w["W_dec"].norm(dim=1), x.double()
    z = x - w["b_dec"] if apply else x
    if architecture == "gated":
        pre = z @ w["W_enc"]
        f = (pre + w["b_gate"] > 0) * torch.relu(pre * w["r_mag"].exp() + w["b_mag"])
    else:
        p = z @ w["W_enc"] + w["b_enc"]
        if architecture == "jumprelu":
            f = torch.relu(p) * (p > w["threshold"])
        elif architecture == "topk":
            p = p * norms if rescale else p
            kept = p >= p.topk(K, dim=-1).values[..., -1:]
            f = torch.relu(p) * kept / (norms if rescale else 1)
        else:
            f = torch.relu(p)
    y = f @ w["W_dec"] + w["b_dec"]
    return f * norms, y + x @ w["W_skip"].T if "W_skip" in w else y


def write_saelens(folder: Path, kind: str, weights: Weights, **cfg: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    d_out = weights["W_dec"].shape[1]
    transcodes = kind.endswith("transcoder")
    tree = {
        "architecture": kind,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": not transcodes,
        "normalize_activations": "none",
        **({"d_out": d_out} if transcodes else {}),
        **({"k": K} if kind == "topk" else {}),
        "metadata": {"sae_lens_version": "6.0.0", "model_name": "gpt2", "hook_name": "blocks.1.hook_mlp_out"},
    }
    (folder / "cfg.json").write_text(json.dumps(tree | cfg))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def module(foreign: Foreign) -> Sae:
    cfg = {"architecture": foreign.architecture, "d_in": D_IN, "d_sae": D_SAE, "d_out": foreign.d_out, "k": K}
    return folded_sae(cfg, foreign.weights).eval().requires_grad_(False)


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))


X = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(9)) * 2


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("architecture", [name for name in FOLDED if name != "topk"])
def test_any_architecture_computes_the_same_after_folding(tmp_path: Path, architecture: str, apply: bool) -> None:
    transcodes = architecture.endswith("transcoder")
    if transcodes and apply:
        return  # SAELens has no such thing
    weights = random_weights(architecture)
    foreign = read_saelens(write_saelens(tmp_path, architecture, weights, apply_b_dec_to_input=apply))
    features, reconstruction = by_hand(architecture, weights, X, apply=apply)
    sae = module(foreign)
    assert 0.05 < float((features > 0).double().mean()) < 0.9
    assert apart(sae.encode(X), features) < 1e-6
    assert apart(sae(X), reconstruction) < 1e-6
    assert torch.allclose(foreign.weights["W_dec"].norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("unit", "rescale"), [(True, False), (True, True), (False, True)])
def test_topk_is_exact_where_its_selection_is_kept(tmp_path: Path, unit: bool, rescale: bool) -> None:
    weights = random_weights("topk", unit=unit)
    foreign = read_saelens(write_saelens(tmp_path, "topk", weights, rescale_acts_by_decoder_norm=rescale))
    features, reconstruction = by_hand("topk", weights, X, apply=True, rescale=rescale)
    sae = module(foreign)
    assert apart(sae.encode(X), features) < 1e-6
    assert apart(sae(X), reconstruction) < 1e-6
    assert foreign.settings == TopKConfig(d_sae=D_SAE, k=K)


def test_topk_is_refused_where_scaling_would_change_the_selection(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, "topk", random_weights("topk"))
    with pytest.raises(UserError, match=r"decoder rows have norms from 0\.\d+ to \d.*would change which features"):
        read_saelens(folder)


def test_a_known_scaling_is_folded(tmp_path: Path) -> None:
    """SAELens trains on x * factor and keeps the factor in activation_scaler.json."""
    weights = random_weights("standard")
    folder = write_saelens(tmp_path, "standard", weights, normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match="expected_average_only_in, whose factor is not known"):
        read_saelens(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.4}))
    features, scaled = by_hand("standard", weights, X * 0.4, apply=True)
    sae = module(read_saelens(folder))
    assert apart(sae(X), scaled / 0.4) < 1e-6
    assert apart(sae.encode(X), features / 0.4) < 1e-6  # what a feature writes, in raw units


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "'layer_norm' .* can't be folded"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ({"architecture": "temporal"}, "architecture 'temporal' .* is not known; known are standard"),
        (
            {"metadata": {"sae_lens_version": "6.1", "model_from_pretrained_kwargs": {"center_writing_weights": True}}},
            "loaded with center_writing_weights",
        ),
        ({"d_sae": 31}, "not those of a standard SAE of its widths: .*size mismatch"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(MiDiscoverError, match=message):
        read_saelens(write_saelens(tmp_path, "standard", random_weights("standard"), **cfg))


def test_a_decoder_row_without_direction_is_refused(tmp_path: Path) -> None:
    weights = random_weights("standard")
    weights["W_dec"][5] = 0
    with pytest.raises(UserError, match="1 decoder rows .* are zero, the first of feature 5"):
        read_saelens(write_saelens(tmp_path, "standard", weights))


def test_the_flat_files_before_version_6(tmp_path: Path) -> None:
    weights = random_weights("topk", unit=True)
    folder = write_saelens(tmp_path, "topk", weights | {"scaling_factor": torch.ones(D_SAE)})
    flat = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "hook_point": "blocks.3.hook_resid_post",
        "model_name": "gpt2",
        "context_size": 64,
        "prepend_bos": True,
    }
    (folder / "cfg.json").write_text(json.dumps(flat))
    foreign = read_saelens(folder)
    assert (foreign.architecture, foreign.model, foreign.context_size) == ("topk", "gpt2", 64)
    assert (foreign.prepend_bos, foreign.hooks.name) == (True, "blocks.3.hook_resid_post")
    assert apart(module(foreign).encode(X), by_hand("topk", weights, X, apply=True)[0]) < 1e-6


OLD = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "hook_name": "blocks.3.hook_resid_post"}
"""What SAELens wrote side by side before version 6."""


@pytest.mark.parametrize("architecture", [None, "standard", "topk"])
def test_topk_before_version_6_is_topk_whatever_it_is_called(tmp_path: Path, architecture: str | None) -> None:
    """By its activation function, as SAELens reads it; in the importer and in `load_sae`."""
    weights = random_weights("topk", unit=True)
    folder = write_saelens(tmp_path, "topk", weights)
    called = {} if architecture is None else {"architecture": architecture}
    cfg = OLD | called | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    right = by_hand("topk", weights, X, apply=True)[0]
    assert float((right > 0).sum(1).max()) == K
    assert apart(module(read_saelens(folder)).encode(X), right) < 1e-6
    assert apart(load_sae(str(folder)).encode(X), right) < 1e-6


def test_before_version_6_a_text_began_with_bos_unless_it_says_otherwise(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, "standard", random_weights("standard"))
    for given, told in (({}, True), ({"prepend_bos": False}, False)):
        (folder / "cfg.json").write_text(json.dumps(OLD | given))
        assert read_saelens(folder).prepend_bos is told


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu' of .* is not supported"),
        ({"activation_fn_str": "topk"}, "activation_fn 'topk' of .* is not supported; .* with its k"),
        ({"hook_name": "blocks.3.attn.hook_z"}, "reshape_activations 'hook_z'"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "loaded with center_writing_weights"),
    ],
)
def test_what_is_not_supported_of_before_version_6_is_refused(
    tmp_path: Path, cfg: dict[str, Any], message: str
) -> None:
    folder = write_saelens(tmp_path, "standard", random_weights("standard"))
    (folder / "cfg.json").write_text(json.dumps(OLD | cfg))
    with pytest.raises(UserError, match=message):
        read_saelens(folder)


def test_an_sae_whose_inputs_must_be_scaled_is_not_loaded_as_if_not(tmp_path: Path) -> None:
    folder = write_saelens(
        tmp_path, "standard", random_weights("standard"), normalize_activations="expected_average_only_in"
    )
    with pytest.raises(UserError, match="'expected_average_only_in' is not supported"):
        load_sae(str(folder))


def test_the_seed_projects_file(tmp_path: Path) -> None:
    """f = relu(encoder(x)), y = decoder(f), with torch's own linear layers."""
    encoder, decoder = torch.nn.Linear(D_IN, D_SAE), torch.nn.Linear(D_SAE, D_IN)
    with torch.no_grad():
        decoder.weight.copy_(torch.nn.functional.normalize(decoder.weight, dim=0))
        decoder.bias.normal_()
        features = torch.relu(encoder(X))
        reconstruction = decoder(features)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    config = {
        "d_model": D_IN,
        "d_hidden": D_SAE,
        "model_name": "microsoft/phi-2",
        "layer_name": "model.layers.16.mlp.fc2",
    }
    (tmp_path / "sae_outputs").mkdir()
    file = tmp_path / "sae_outputs" / "sae_model.pt"
    torch.save({"model_state_dict": state, "config": config}, file)
    for given in (file, file.parent):
        foreign = read_seed(given)
        assert (foreign.source, foreign.model, foreign.hooks.path) == (
            "sae_outputs",
            "microsoft/phi-2",
            config["layer_name"],
        )
        assert foreign.settings == StandardConfig(d_sae=D_SAE, l1_coefficient=0.0)
        assert apart(module(foreign).encode(X), features.double()) < 1e-6
        assert apart(module(foreign)(X), reconstruction.double()) < 1e-6
    torch.save({"model_state_dict": state, "config": config | {"d_model": 13}}, file)
    with pytest.raises(CorruptError, match="an SAE from 12 to 30, and its config says from 13 to 30"):
        read_seed(file)


def damage(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flipped(data: bytearray) -> bytearray:
    """One bit of W_dec, whose first number has the lowest bits of its mantissa at that place."""
    place = data.index(random_weights("standard")["W_dec"].numpy().tobytes())
    data[place] ^= 1
    return data


def test_damaged_files_are_found(tmp_path: Path) -> None:
    file = tmp_path / "seed" / "sae_model.pt"
    file.parent.mkdir()
    whole = {
        "state_dict": random_weights("standard"),
        "config": {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE},
    }
    torch.save(whole, file)
    assert read_seed(file).d_in == D_IN
    for change, message in (
        (lambda data: data[:-50], "cut short, or was not written by torch.save"),
        (flipped, "is damaged: .* has another checksum"),
        (lambda data: b"", "cut short"),
    ):
        torch.save(whole, file)
        damage(file, change)
        with pytest.raises(CorruptError, match=message):
            read_seed(file)
    folder = write_saelens(tmp_path / "sae", "standard", random_weights("standard"))
    damage(folder / "sae_weights.safetensors", lambda data: data[:-50])
    with pytest.raises(CorruptError, match="can't be read: .*Fetch it again"):
        read_saelens(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(CorruptError, match="not readable as JSON"):
        read_saelens(folder)


def test_a_flipped_bit_is_found_where_a_checksum_stands_beside(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, "standard", random_weights("standard"))
    told = folders.sha256(folder / "sae_weights.safetensors")
    files = {"sae_weights.safetensors": {"sha256": told, "bytes": 1}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    assert read_saelens(folder).sha256 == told
    damage(folder / "sae_weights.safetensors", flipped)
    with pytest.raises(CorruptError, match="is damaged: its sha256 is not the one written beside it"):
        read_saelens(folder)


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    weights = random_weights("standard")
    weights["b_enc"][3] = float("inf")
    with pytest.raises(CorruptError, match="b_enc in the weights of .* not finite"):
        read_saelens(write_saelens(tmp_path, "standard", weights))


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (eval, ("1/0",))


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"W": torch.ones(1)}, "config": Code()}, tmp_path / "sae_model.pt")
    with pytest.raises(CorruptError, match="can't be read as tensors and plain values"):
        read_checkpoint((tmp_path / "sae_model.pt").read_bytes(), "it")


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"There is no cfg.json"):
        read_saelens(tmp_path)
    with pytest.raises(NotFoundError, match=r"There is no sae_model.pt"):
        read_seed(tmp_path)
    write_saelens(tmp_path, "standard", random_weights("standard"))
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"There is no sae_weights.safetensors"):
        read_saelens(tmp_path)


def test_ours_come_back_as_they_left(tmp_path: Path) -> None:
    """Through a SAELens folder and through the seed's file, under both namings."""
    ours = folders.write_sae(tmp_path / "store", "standard")
    sae, x = load_sae(str(ours)), torch.randn(50, 6, generator=torch.Generator().manual_seed(3)) * 60
    cfg = json.loads((ours / "cfg.json").read_text())
    weights = folders.weights_of(ours)
    weights["b_enc"] = weights["b_enc"].clamp(min=-2)  # the seed's form has no b_dec at the input to lose
    for own in (True, False):
        linear = weights | {"b_enc": weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]}
        bundle = folders.write_bundle(tmp_path / f"bundle-{own}", cfg, weights if own else linear, own=own)
        back = read_seed(bundle)
        again = folded_sae({"architecture": "standard", "d_in": 6, "d_sae": 40}, back.weights)
        there = folded_sae({"architecture": "standard", "d_in": 6, "d_sae": 40}, weights)
        with torch.no_grad():
            assert apart(again.encode(x), there.encode(x).double()) < 1e-6
            assert apart(again(x), there(x).double()) < 1e-6
    back = read_saelens(ours)
    assert all(torch.equal(back.weights[name], value) for name, value in sae.module.state_dict().items())


def test_what_our_own_export_tells_of_itself_is_kept(tmp_path: Path) -> None:
    details = {"k": 6, "threshold_decay": 0.5, "control": "none", "auxk_coefficient": 0.25}
    about = {"training_architecture": "batchtopk", "training_architecture_details": details, "model_name": "gpt2"}
    folder = write_saelens(tmp_path, "jumprelu", random_weights("jumprelu"), metadata=about)
    assert read_saelens(folder).settings == BatchTopKConfig(
        d_sae=D_SAE, k=6, threshold_decay=0.5, auxk_coefficient=0.25
    )


def test_the_id_follows_what_is_computed(tmp_path: Path) -> None:
    one = read_saelens(write_saelens(tmp_path / "a", "standard", random_weights("standard")))
    same = read_saelens(write_saelens(tmp_path / "b", "standard", random_weights("standard"), device="cuda"))
    other = read_saelens(write_saelens(tmp_path / "c", "standard", random_weights("standard", seed=1)))
    place = {"hook": "h", "output_hook": "h", "harvest": "h.1"}
    assert one.id("x", **place) == same.id("x", **place)
    assert one.id("x", **place).startswith("imp.x.")
    others = [other.id("x", **place), one.id("x", **place | {"hook": "g"}), one.id("x", **place | {"harvest": "h.2"})]
    assert len({one.id("x", **place), *others}) == 4
