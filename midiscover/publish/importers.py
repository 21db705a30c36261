"""SAEs of other makers as ours: read, checked, and folded so that decoder rows have norm 1. Exact, or an error.

`read_saelens` takes a SAELens folder of any architecture that this version computes, `read_seed` the sae_model.pt of
the seed project, in its own form or in that of our bundle. Features are rescaled by the norms of their decoder rows:
what they write is the same, and their values are those that every tool shows after folding.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from midiscover.errors import CorruptError, NotFoundError, UserError
from midiscover.ids import fingerprint
from midiscover.publish.sourcehooks import SourceHooks
from midiscover.sae.registry import ARCHITECTURES, FOLDED
from midiscover.saeconfig import SAE_KINDS, SaeConfig
from midiscover.saelenscfg import checked_sae, modern_cfg, whole_k
from midiscover.saes import CFG, WEIGHTS

SEED_MODEL = "sae_model.pt"
SCALER = "activation_scaler.json"
"""Of a SAELens training checkpoint: the factor that `expected_average_only_in` stands for."""
UNIT = 1e-6
"""Rows this close to norm 1 have it but for rounding, and stay as they are."""
IMPORTED = "imp."
"""What the id of an imported SAE begins with."""
_BIASES = ("b_enc", "b_gate", "b_mag", "threshold")
"""Tensors [d_sae] in units of pre-activations."""
_UNKNOWN_SPARSITY: Mapping[str, dict[str, float]] = {
    "standard": {"l1_coefficient": 0.0},
    "gated": {"l1_coefficient": 0.0},
    "transcoder": {"l1_coefficient": 0.0},
    "skip_transcoder": {"l1_coefficient": 0.0},
    "jumprelu": {"l0_coefficient": 0.0},
}
"""Settings where the source does not tell them: 0, as what was not set here."""
_CHECKPOINTS = ("checkpoint_value", "checkpoint_index")
"""How TransformerLens is told which step of a model's own training is meant."""
_FOUND = ("kind", "output_hook")
"""Settings that the SAE itself and its place in the model show."""
_TOLD = (
    "sae_lens_version",
    "dataset_path",
    "training_architecture",
    "training_architecture_details",
    "midiscover_id",
    "training_run_id",
)
"""What a source says of itself that the record keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """An SAE of another maker, folded."""

    source: str
    """What it was read from, for people."""
    form: str
    """`saelens` or `seed`."""
    sha256: str
    """Of the file with its weights."""
    architecture: str
    """In SAELens' words."""
    weights: dict[str, Tensor]
    """Folded: raw inputs, unit decoder rows, float32."""
    settings: SaeConfig
    """Its kind and, as far as the source tells them, its settings."""
    known: tuple[str, ...]
    """Names of the settings that are known; the others are defaults."""
    hooks: SourceHooks
    model: str | None = None
    """What the source calls the language model."""
    revision: str | None = None
    """Branch, tag or commit of the model."""
    checkpoint: str | None = None
    """The step of the model's own training, in TransformerLens' words, such as `checkpoint_value 1000`."""
    context_size: int | None = None
    prepend_bos: bool | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """What else the source says of itself."""

    @property
    def d_in(self) -> int:
        """Width of its inputs."""
        return self.weights["W_enc"].shape[0]

    @property
    def d_out(self) -> int:
        """Width of what it reconstructs."""
        return self.weights["W_dec"].shape[1]

    @property
    def trained_as(self) -> dict[str, Any]:
        """For cfg.json: how it was trained, in the source's words; without settings where it gives none."""
        told = {"training_architecture": self.settings.kind, "training_architecture_details": {}}
        return {name: self.about.get(name, value) for name, value in told.items()}

    def weight_bytes(self) -> bytes:
        """sae_weights.safetensors."""
        return save(self.weights)

    def id(self, name: str, *, hook: str, output_hook: str, harvest: str) -> str:
        """`imp.<name>.<hash>`: of the folded weights, what decides among their features, and where they are read."""
        given = {
            "weights": hashlib.sha256(self.weight_bytes()).hexdigest(),
            "architecture": self.architecture,
            "k": getattr(self.settings, "k", None) if self.architecture == "topk" else None,
            "hook": hook,
            "output_hook": output_hook,
            "harvest": harvest,
        }
        return f"{IMPORTED}{name}." + fingerprint("import", 1, given)


def read_saelens(folder: Path) -> Foreign:
    """A SAELens folder. UserError for what can't be folded exactly, CorruptError for damaged files."""
    cfg = _cfg(folder)
    try:
        data = (folder / WEIGHTS).read_bytes()
    except OSError:
        raise NotFoundError(f"There is no {WEIGHTS} in {folder}; a SAELens folder has one beside its {CFG}.") from None
    try:
        weights = load(data)
    except SafetensorError as error:
        raise CorruptError(f"{folder / WEIGHTS} can't be read: {error}. Fetch it again.") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if _promised(folder) not in (None, sha256):
        raise CorruptError(
            f"{folder / WEIGHTS} is damaged: its sha256 is not the one written beside it. Fetch it again."
        )
    about = cfg.get("metadata", cfg)  # before version 6, all in one
    return _foreign("saelens", folder, folder.resolve().name, sha256, cfg, about, weights, _input_factor(cfg, folder))


def read_seed(path: Path) -> Foreign:
    """sae_model.pt, or the folder that holds it.

    The seed project's own: `model_state_dict` with encoder.weight [n, d], encoder.bias, decoder.weight [d, n],
    decoder.bias, f = relu(W x + b) on raw activations; and `config` with d_model, d_hidden, model_name, layer_name. Or
    that of our bundle: `state_dict` under either naming, and as `config` a SAELens cfg.json.
    """
    file = path / SEED_MODEL if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError:
        raise NotFoundError(f"There is no {SEED_MODEL} in {path}; the seed project's folder has one.") from None
    content = read_checkpoint(data, str(file))
    config, state = content["config"], content["state"]
    if "encoder.weight" in state:
        cfg, weights = _of_linear_layers(config, state, str(file))
    else:
        cfg, weights = dict(config), state
    about, sha256 = cfg.get("metadata", config), hashlib.sha256(data).hexdigest()
    return _foreign("seed", file, file.resolve().parent.name, sha256, cfg, about, weights, None)


def read_checkpoint(data: bytes, name: str) -> dict[str, Any]:
    """`config` and `state` (name -> tensor) of a sae_model.pt. CorruptError for anything else.

    The one place that reads a pickle, of a file that somebody hands in, and without anything in it that could run.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise CorruptError(f"{name} is cut short, or was not written by torch.save: it is no whole zip archive.")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            broken = archive.testzip()  # torch.load does not compare the checksums
        if broken is not None:
            raise CorruptError(f"{name} is damaged: {broken} in it has another checksum. Fetch it again.")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CorruptError:
        raise
    except Exception as error:  # torch raises many kinds, over several lines
        raise CorruptError(f"{name} can't be read as tensors and plain values: {str(error).splitlines()[0]}") from None
    state = content.get("state_dict", content.get("model_state_dict")) if isinstance(content, dict) else None
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(state, Mapping) or not isinstance(config, Mapping):
        raise CorruptError(f"{name} holds no state_dict and config, which the seed project's file has.")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CorruptError(f"The state_dict of {name} holds what is no tensor.")
    return {"config": dict(config), "state": {key: value.contiguous() for key, value in state.items()}}


def _foreign(
    form: str,
    path: Path,
    source: str,
    sha256: str,
    cfg: Mapping[str, Any],
    about: Any,
    weights: Mapping[str, Tensor],
    factor: float | None,
) -> Foreign:
    if not isinstance(about, Mapping):
        raise CorruptError(f"The metadata of {path} are no JSON object.")
    loaded_with = about.get("model_from_pretrained_kwargs")
    loaded_with = loaded_with if isinstance(loaded_with, Mapping) else {}
    _require_plain_model(loaded_with, str(path))
    revision = loaded_with.get("revision")
    architecture, folded = _folded(cfg, weights, str(path), factor)
    settings, known = _settings(architecture, cfg, about, str(path))
    model, context_size, prepend_bos = (about.get(name) for name in ("model_name", "context_size", "prepend_bos"))
    return Foreign(
        source=source,
        form=form,
        sha256=sha256,
        architecture=architecture,
        weights=folded,
        settings=settings,
        known=known,
        hooks=SourceHooks.of(about),
        model=model if isinstance(model, str) and model else None,
        revision=revision if isinstance(revision, str) and revision else None,
        checkpoint=next(
            (f"{key} {loaded_with[key]}" for key in _CHECKPOINTS if loaded_with.get(key) is not None), None
        ),
        context_size=context_size if isinstance(context_size, int) and not isinstance(context_size, bool) else None,
        prepend_bos=prepend_bos if isinstance(prepend_bos, bool) else None,
        about={name: about[name] for name in _TOLD if about.get(name) is not None},
    )


def _require_plain_model(kwargs: Mapping[str, Any], name: str) -> None:
    """UserError for an SAE of a model whose weights TransformerLens had changed: its activations are others."""
    if kwargs.get("center_writing_weights"):
        raise UserError(
            f"{name} reads a model that TransformerLens had loaded with center_writing_weights, which takes its mean "
            "off each activation; only SAEs on the model's own activations can be imported."
        )


def _promised(folder: Path) -> str | None:
    """The sha256 of the weights that a record or an export's manifest in the folder gives."""
    for name in ("record.json", "manifest.json"):
        try:
            told = json.loads((folder / name).read_text())["files"][WEIGHTS]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        return told["sha256"] if isinstance(told, dict) else str(told)
    return None


def _of_linear_layers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    wanted = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    if set(state) != wanted:
        raise CorruptError(
            f"{name} holds {', '.join(sorted(state))}; the seed project's has {', '.join(sorted(wanted))}."
        )
    d_sae, d_in = state["encoder.weight"].shape
    told = config.get("d_model", d_in), config.get("d_hidden", d_sae)
    if told != (d_in, d_sae):
        raise CorruptError(
            f"{name} holds an SAE from {d_in} to {d_sae}, and its config says from {told[0]} to {told[1]}."
        )
    cfg = {"architecture": "standard", "d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": False}
    return cfg, {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["encoder.bias"],
        "W_dec": state["decoder.weight"].T,
        "b_dec": state["decoder.bias"],
    }


def _cfg(folder: Path) -> dict[str, Any]:
    try:
        cfg = json.loads((folder / CFG).read_text(), parse_constant=lambda _: None)  # no record may hold a NaN
    except OSError:
        raise NotFoundError(f"There is no {CFG} in {folder}; a folder in SAELens' format has one.") from None
    except ValueError as error:
        raise CorruptError(f"{folder / CFG} is not readable as JSON: {error}.") from None
    return modern_cfg(cfg, str(folder))


def _input_factor(cfg: Mapping[str, Any], folder: Path) -> float | None:
    """What inputs are multiplied by before the SAE; None where they are taken as they are."""
    how = cfg.get("normalize_activations", "none")
    if cfg.get("reshape_activations", "none") != "none":
        raise UserError(
            f"reshape_activations '{cfg['reshape_activations']}' of {folder} is not supported; only SAEs on the plain "
            "output of a module are."
        )
    if how in ("none", False, None):
        return None
    if how not in ("expected_average_only_in", True):
        raise UserError(
            f"normalize_activations '{how}' of {folder} can't be folded into the weights: it is another factor for "
            "each token."
        )
    try:
        factor = json.loads((folder / SCALER).read_text())["scaling_factor"]
    except (OSError, ValueError, KeyError, TypeError):
        factor = None
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not factor > 0:
        raise UserError(
            f"normalize_activations of {folder} is expected_average_only_in, whose factor is not known: fold it in "
            f"SAELens before saving, or put the {SCALER} of its training beside the weights."
        )
    return float(factor)


def _folded(
    cfg: Mapping[str, Any], weights: Mapping[str, Tensor], name: str, factor: float | None
) -> tuple[str, dict[str, Tensor]]:
    """Architecture and weights for raw inputs, with unit decoder rows and b_dec taken off the input."""
    kept, architecture = checked_sae(cfg, weights, name).state_dict(), str(cfg["architecture"])
    w = {key: weights[key].double() for key in kept}
    if factor is not None:
        w |= {"W_enc": w["W_enc"] * factor, "W_dec": w["W_dec"] / factor, "b_dec": w["b_dec"] / factor}
    if not FOLDED[architecture].transcodes and cfg.get("apply_b_dec_to_input", True) is False:
        w = _with_b_dec_at_the_input(w)
    if "threshold" in w:
        w["threshold"] = w["threshold"].clamp(min=0)  # f = relu(pre) where pre is above it, so that 0 does the same
    w = _with_unit_rows(w, name, selects=architecture == "topk" and not cfg.get("rescale_acts_by_decoder_norm"))
    return architecture, {key: value.float().contiguous() for key, value in w.items()}


def _with_b_dec_at_the_input(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """x @ W + b = (x - b_dec) @ W + (b + b_dec @ W), for each bias of a pre-activation."""
    shift = w["b_dec"] @ w["W_enc"]
    moved = {name: w[name] + shift for name in ("b_enc", "b_gate") if name in w}
    if "b_mag" in w:
        moved["b_mag"] = w["b_mag"] + shift * w["r_mag"].exp()
    return w | moved


def _with_unit_rows(w: dict[str, Tensor], name: str, *, selects: bool) -> dict[str, Tensor]:
    norms = w["W_dec"].norm(dim=1)
    zero = (norms == 0).nonzero().flatten()
    if len(zero):
        raise UserError(
            f"{len(zero)} decoder rows of {name} are zero, the first of feature {int(zero[0])}; they have no direction "
            "that could be scaled to norm 1."
        )
    apart = (norms - 1).abs() > UNIT
    if not apart.any():
        return w
    low, high = float(norms.min()), float(norms.max())
    if selects and high - low > UNIT * high:
        raise UserError(
            f"{name} is a TopK SAE whose decoder rows have norms from {low:.7g} to {high:.7g}: scaling them to 1 would "
            "change which features are kept. Only rescale_acts_by_decoder_norm true, or rows of one norm, can be "
            "imported exactly."
        )
    # One factor for all features of a TopK SAE keeps their order, on which the selection depends.
    norms = norms.mean().expand_as(norms) if selects else torch.where(apart, norms, 1)
    scaled = {key: w[key] * norms for key in _BIASES if key in w}
    return w | scaled | {"W_enc": w["W_enc"] * norms, "W_dec": w["W_dec"] / norms[:, None]}


def _settings(
    architecture: str, cfg: Mapping[str, Any], about: Mapping[str, Any], name: str
) -> tuple[SaeConfig, tuple[str, ...]]:
    """Kind and settings as the source tells them, where they are ours, else what its architecture shows; and the names
    of those settings, beside which our defaults stand.
    """
    sure: dict[str, Any] = {"d_sae": cfg["d_sae"]}
    if architecture == "topk":  # SAELens leaves it out of the details, since cfg.json has it by itself
        sure["k"] = whole_k(cfg["k"], name)
    kind, details = str(about.get("training_architecture")), about.get("training_architecture_details")
    ours = kind in ARCHITECTURES and ARCHITECTURES[kind].saelens_architecture == architecture
    if ours and isinstance(details, Mapping):
        fields = SAE_KINDS[kind].__dataclass_fields__
        told = {key: tuple(v) if isinstance(v, list) else v for key, v in details.items() if key in fields}
        given: dict[str, Any] = {**_UNKNOWN_SPARSITY.get(kind, {}), **told, **sure}
        given |= {"control": "none", "expansion_factor": None}
        try:
            if "k" in given:
                given["k"] = whole_k(given["k"], name)
            if "k" in given or "k" not in fields:
                return SAE_KINDS[kind](**given), (*_FOUND, *given)
        except (TypeError, ValueError, UserError):
            pass  # of another tool under the same name, or of BatchTopK, whose k may be a fraction there
    given = {**_UNKNOWN_SPARSITY.get(architecture, {}), **sure}
    return SAE_KINDS[architecture](**given), (*_FOUND, *given)
