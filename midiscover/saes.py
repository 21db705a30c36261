"""SAEs in a store: written as SAELens v6 folders with a record, read from an id, a folder or a URI.

Order of writing: weights and cfg.json, training.json (trained), evaluations/<id>.json (measured), record.json last.
A folder without a record is work in progress; with one it is immutable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from midiscover import lineage
from midiscover.configio import to_tree
from midiscover.errors import CorruptError, NotFoundError, UserError
from midiscover.ids import hook_layer
from midiscover.resolve import PlannedSae, Resolved
from midiscover.sae.base import Sae, l1_conventions
from midiscover.saeconfig import L1Config
from midiscover.saelenscfg import checked_sae, modern_cfg
from midiscover.store import layout
from midiscover.store.documents import dump, folders_with, read_json
from midiscover.store.storage import Storage, folder_of, open_store
from midiscover.train import Trained

RECORD_VERSION = 1
SAELENS_VERSION = "6.54.12"
"""The SAELens release whose format is written; the tests load our folders in it."""
CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
STREAMED = "streamed"
"""Word of a record's lineage: its activations came from a live model, and none were stored."""


def saelens_cfg(
    planned: PlannedSae,
    resolved: Resolved,
    sae: Sae,
    *,
    prepend_bos: bool,
    trained_as: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """cfg.json of SAELens v6 for an SAE that reads a Hugging Face module.

    prepend_bos: whether the corpus put a BOS token at the start of each window. `architecture` is what the weights are;
    what they were trained as stands in the metadata, with its settings, as SAELens writes its own. trained_as: these
    two of an SAE of another maker, in its words.
    """
    config, hook, kind = resolved.config, planned.point.hook, planned.point.sae.kind
    output = planned.output_hook
    predicted = {"hook_name_out": output, "hook_head_index_out": None, "hf_hook_name_out": output}
    settings = {name: value for name, value in to_tree(planned.point.sae).items() if name != "kind"}
    return {
        "architecture": sae.saelens_architecture,
        "d_in": planned.d_in,
        "d_sae": planned.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **sae.saelens_fields(),
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": resolved.model.hub_id or resolved.model.name,
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": hook,
            "hook_layer": hook_layer(hook),
            "hook_head_index": None,
            "hf_hook_name": hook,
            **(predicted if sae.transcodes else {}),
            "prepend_bos": prepend_bos,
            "context_size": config.corpus.context_size,
            "seqpos_slice": [1, None] if config.harvest.mask_first else [None],
            "dataset_path": resolved.source.name,
            "exclude_special_tokens": True,
            "model_from_pretrained_kwargs": {"revision": resolved.model.revision} if config.model.revision else {},
            "neuronpedia_id": None,
            "training_architecture": kind,
            "training_architecture_details": settings,
            **(trained_as or {}),
            "midiscover_id": planned.id,
        },
    }


def write_trained(
    storage: Storage,
    planned: PlannedSae,
    resolved: Resolved,
    trained: Trained,
    *,
    prepend_bos: bool,
    run: Mapping[str, Any],
    trained_as: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and cfg.json, then training.json, which says that this SAE is trained; nothing where it says so.

    run: where it was trained (threads, device, trainer), kept in the record's lineage. trained_as: see `saelens_cfg`.
    """
    if storage.exists(layout.training(planned.id)):
        return
    weights, key = save(trained.weights), layout.sae_file(planned.id, WEIGHTS)
    # Another run may train the same SAE right now, and a killed one may have left its weights. They come from the same
    # settings and rows, so those that stand first stay: whoever is first with training.json then names what stands,
    # and nobody takes it away. The history may be that of the other run, which differs by rounding.
    if not storage.create(key, weights):
        weights = storage.read(key)
    cfg = saelens_cfg(planned, resolved, trained.sae, prepend_bos=prepend_bos, trained_as=trained_as)
    storage.create(layout.sae_file(planned.id, CFG), dump(cfg))
    training = {
        "v": RECORD_VERSION,
        "id": planned.id,
        "history": trained.history,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 3),
        "dead_in_window": trained.dead_in_window,
        "lr": trained.lr,
        "coefficient": trained.coefficient,
        "normalisation": {
            "scale": trained.scale,
            "mean_norm": planned.d_in**0.5 / trained.scale,
            "output_scale": trained.output_scale,
        },
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "run": dict(run),
    }
    if run.get("activations") == STREAMED:  # no manifest will tell
        training["output_mean"] = trained.output_mean.tolist()
    storage.create(layout.training(planned.id), dump(training))


def has_ended(storage: Storage, sweep_id: str, planned: PlannedSae) -> bool:
    """Whether an SAE of a sweep is trained, or was dropped by the retirement that its settings ask for."""
    if storage.exists(layout.training(planned.id)):
        return True
    asked = planned.point.train.retire_after is not None
    return asked and storage.exists(layout.retired(sweep_id, planned.id))


def commit_record(
    storage: Storage,
    planned: PlannedSae,
    resolved: Resolved,
    *,
    metrics: Mapping[str, Any],
    imported: Mapping[str, Any] | None = None,
    known: Container[str] | None = None,
) -> dict[str, Any]:
    """Write record.json, the last file of an SAE, and return the record that stands (another writer's, if first).

    imported: where an SAE of another maker comes from; how it was trained is then not known. known: the settings that
    it tells, where not all are; the others are left out.
    """
    training = read_json(storage, layout.training(planned.id))
    assert training is not None, "an SAE is trained before it is committed"
    sae, train = planned.point.sae, planned.point.train
    conventions = None
    if isinstance(sae, L1Config) and imported is None:
        normalisation = training["normalisation"]
        conventions = l1_conventions(
            training["coefficient"], scale=normalisation["output_scale"], d_in=planned.d_out, d_sae=planned.d_sae
        )
    files = {
        name: hashlib.sha256(storage.read(layout.sae_file(planned.id, name))).hexdigest()
        for name in (CFG, WEIGHTS, SPARSITY)
    }
    if files[WEIGHTS] != training["weights_sha256"]:
        raise CorruptError(
            f"The weights of {planned.id} are not those that were trained; remove its folder to train anew."
        )
    record = {
        "v": RECORD_VERSION,
        "id": planned.id,
        "created": lineage.now(),
        "hook": planned.point.hook,
        "output_hook": planned.output_hook,
        "layer": hook_layer(planned.point.hook),
        "d_in": planned.d_in,
        "d_sae": planned.d_sae,
        "kind": sae.kind,
        "sae": {name: value for name, value in to_tree(sae).items() if known is None or name in known},
        "train": to_tree(train) if imported is None else None,
        "l1": conventions,
        "normalisation": training["normalisation"],
        "evaluation_id": resolved.evaluation_id,
        "config": read_from(resolved, (planned.point.hook, planned.output_hook)),
        "metrics": dict(metrics) | {"dead_in_window_share": training["dead_in_window"]},
        "lineage": harvest_lineage(resolved) | {"seed": train.seed if imported is None else None} | training["run"],
        "files": files,
        "seconds": training["seconds"],
        "owner": lineage.owner(),
    } | ({} if imported is None else {"imported": dict(imported)})
    key = layout.record(planned.id)
    if storage.create(key, dump(record)):
        return record
    standing = read_json(storage, key)
    assert standing is not None
    return standing


def read_from(resolved: Resolved, hooks: Iterable[str]) -> dict[str, Any]:
    """The settings under which the activations of these hooks can be had again: model, corpus, harvest, evaluate."""
    config = to_tree(resolved.config)
    config["harvest"]["hooks"] = list(dict.fromkeys(hooks))
    return {section: config[section] for section in ("model", "corpus", "harvest", "evaluate")}


def harvest_lineage(resolved: Resolved) -> dict[str, Any]:
    """Model, corpus, code and versions, as they stand in the manifests of a harvest."""
    model, source = resolved.model, resolved.source
    dtype, weights = resolved.config.model.dtype, resolved.config.model.weights
    return {
        "model": {"name": model.name, "digest": model.digest, "revision": model.revision, "dtype": dtype}
        | ({"weights": weights} if weights != "trained" else {}),
        "corpus": {"id": resolved.corpus_id, "source": source.name, "revision": source.digest},
        "harvest": resolved.harvest_id,
        "code": lineage.code(),
        "versions": lineage.versions(),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSae:
    """A trained SAE, ready to use on raw activations.

    >>> features = sae.encode(activations)    # [tokens, d_in] -> [tokens, d_sae]
    >>> activations_hat = sae.decode(features)
    >>> activations_hat = sae.reconstruct(activations)    # the same, and with a transcoder's skip connection
    """

    module: Sae
    cfg: dict[str, Any]
    """cfg.json of SAELens."""
    record: dict[str, Any] | None
    """record.json; None for a folder of another origin."""

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., d_sae] of raw activations [..., d_in]."""
        with torch.no_grad():
            return self.module.encode(x.to(self.module.W_enc))

    def decode(self, features: Tensor) -> Tensor:
        """What features [..., d_sae] write: reconstructed raw activations [..., d_out], d_in but for transcoders.

        For a skip transcoder, this lacks what its skip connection adds; see `reconstruct`.
        """
        with torch.no_grad():
            return self.module.decode(features.to(self.module.W_dec))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The whole pass: raw activations [..., d_in] to reconstructed, or predicted, ones [..., d_out]."""
        with torch.no_grad():
            return self.module(x.to(self.module.W_enc))


def load_sae(source: str | Path, *, store: str | None = None, device: str = "cpu") -> LoadedSae:
    """Load an SAE by id, unique id prefix, folder, or s3:// address of a folder with a cfg.json.

    store: where ids are looked up, as in `--store`. NotFoundError where nothing or more than one fits; CorruptError
    where the weights are not those that were committed; UserError for an architecture this version does not know.
    """
    named = str(source)
    if named.startswith("s3://"):
        folder, _, name = named.rstrip("/").rpartition("/")
        return _load(open_store(folder, create=False), name, device)
    local = folder_of(named).resolve()
    if (local / CFG).is_file():
        return _load(open_store(str(local.parent), create=False), local.name, device)
    if isinstance(source, Path) or "/" in named:  # no id has one
        raise NotFoundError(f"There is no {CFG} in '{named}'; give the folder of an SAE, its s3:// address or its id.")
    storage = open_store(store, create=False)
    return _load(storage, layout.sae_folder(find_sae(storage, named)), device)


def sae_ids(storage: Storage) -> list[str]:
    """Ids of all committed SAEs of a store, sorted."""
    return folders_with(storage, layout.SAES, "record.json")


def find_sae(storage: Storage, prefix: str) -> str:
    """The one committed SAE whose id is, or begins with, `prefix`."""
    known = sae_ids(storage)
    fits = [prefix] if prefix in known else [name for name in known if name.startswith(prefix)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise NotFoundError(
            f"'{prefix}' fits {len(fits)} SAEs of {storage.uri}: {', '.join(fits[:5])}; give more of the id."
        )
    listed = f"it holds {', '.join(known[:5])}{' ...' if len(known) > 5 else ''}" if known else "it holds no SAE"
    raise NotFoundError(f"There is no SAE '{prefix}' in {storage.uri}; {listed}.")


def load_stored(storage: Storage, sae_id: str, *, device: str = "cpu") -> LoadedSae:
    """`load_sae` by a whole id of an open store: nothing is looked for."""
    return _load(storage, layout.sae_folder(sae_id), device)


def load_trained(storage: Storage, sae_id: str, *, device: str = "cpu") -> Sae:
    """The folded SAE of an id whose training is done, committed or not."""
    return load_stored(storage, sae_id, device=device).module


def _load(storage: Storage, folder: str, device: str) -> LoadedSae:
    read = read_json(storage, f"{folder}/{CFG}")
    if read is None:
        raise NotFoundError(f"There is no {CFG} in {storage.uri}/{folder}; an SAE folder in SAELens' format has one.")
    cfg = modern_cfg(read, f"{storage.uri}/{folder}")
    record = read_json(storage, f"{folder}/record.json")
    data = storage.read(f"{folder}/{WEIGHTS}")
    if record is not None and hashlib.sha256(data).hexdigest() != record["files"][WEIGHTS]:
        raise CorruptError(f"The weights in {storage.uri}/{folder} differ from those that were committed.")
    try:
        weights = load(data)
    except SafetensorError as error:
        raise CorruptError(f"{WEIGHTS} in {storage.uri}/{folder} can't be read: {error}.") from None
    _refuse_unfolded(cfg)
    module = checked_sae(cfg, weights, f"{storage.uri}/{folder}").eval().requires_grad_(False)
    if cfg["architecture"] == "topk" and cfg.get("rescale_acts_by_decoder_norm"):
        # Selection is by pre-activation times decoder norm; with that in the encoder the rows have unit norm.
        norms = module.W_dec.norm(dim=1).clamp(min=1e-8)
        norms = torch.where((norms - 1).abs() < 1e-6, 1, norms)  # ours have 1 but for rounding, and stay as they are
        module.W_enc.mul_(norms)
        module.b_enc.mul_(norms)
        module.W_dec.div_(norms[:, None])
    return LoadedSae(module=module.to(device), cfg=cfg, record=record)


def _refuse_unfolded(cfg: Mapping[str, Any]) -> None:
    """UserError for a cfg.json that this version would read wrongly."""
    if cfg.get("normalize_activations") not in ("none", False, None):
        raise UserError(
            f"normalize_activations '{cfg['normalize_activations']}' is not supported; fold it before saving."
        )
    if not cfg.get("apply_b_dec_to_input", True) and not str(cfg.get("architecture")).endswith("transcoder"):
        raise UserError("An SAE with apply_b_dec_to_input false is not supported; fold b_dec into b_enc before saving.")
