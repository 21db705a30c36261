"""Exports of one SAE: files first, manifest.json last, so that a folder with a manifest is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from midiscover.errors import NotFoundError, UserError
from midiscover.features.records import open_features
from midiscover.models import config_folder, hook_table
from midiscover.origin import resolve_origin
from midiscover.publish.names import checked_model_id, checked_source_set, model_id, source_id, source_set
from midiscover.publish.neuronpedia import ModelFacts, NeuronpediaExport, NeuronpediaNames
from midiscover.publish.saelens import saelens_files
from midiscover.saes import CFG, dump, read_json
from midiscover.store import layout
from midiscover.store.storage import Storage

VERSION = 1
MANIFEST = "manifest.json"
FORMATS = ("saelens", "neuronpedia")


def export_sae(
    storage: Storage, sae_id: str, kind: str, out: Storage, prefix: str = "", names: NeuronpediaNames | None = None
) -> dict[str, Any]:
    """Write an SAE in one of `FORMATS` below `prefix` of `out`; returns the manifest.

    UserError where something else stands there, or a name is not one of Neuronpedia's; NotFoundError where the feature
    records that an export needs are not made yet. A finished equal export is written anew with the same bytes.
    """
    if kind not in FORMATS:
        raise UserError(f"'{kind}' is no export format; known are {', '.join(FORMATS)}.")
    record = read_json(storage, layout.record(sae_id))
    if record is None:
        raise NotFoundError(f"There is no finished SAE '{sae_id}' in {storage.uri}.")
    _refuse_strangers(out, prefix, kind, sae_id)
    names = names or NeuronpediaNames()
    made = _files(storage, record, kind, names)  # wrong names are refused here, before anything changes
    out.delete(_key(prefix, MANIFEST))
    files = {}
    for name, data in made:
        out.write(_key(prefix, name), data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest = {"v": VERSION, "kind": kind, "sae": sae_id, "files": files}
    out.write(_key(prefix, MANIFEST), dump(manifest))
    return manifest


def _files(
    storage: Storage, record: dict[str, Any], kind: str, names: NeuronpediaNames
) -> Iterable[tuple[str, bytes]] | Iterator[tuple[str, bytes]]:
    cfg = read_json(storage, layout.sae_file(record["id"], CFG))
    assert cfg is not None, "a finished SAE has a cfg.json"
    facts = _facts(storage, record)
    if kind == "neuronpedia":
        records = open_features(storage, record["id"])
        return NeuronpediaExport(record, cfg, facts, names).files(records)
    model = checked_model_id(names.model) if names.model else model_id(record["lineage"]["model"]["name"])
    set_name = checked_source_set(names.source_set) if names.source_set else source_set(record)
    named = f"{model}/{source_id(record, set_name)}"
    return saelens_files(storage, record, facts.model_type, named).items()


def _facts(storage: Storage, record: dict[str, Any]) -> ModelFacts:
    identity = resolve_origin(record, storage.uri)
    config = json.loads((config_folder(identity) / "config.json").read_text())
    table = hook_table(identity)
    wide = (config.get(name) for name in ("intermediate_size", "n_inner"))
    return ModelFacts(
        name=identity.hub_id or identity.name,
        model_type=config.get("model_type"),
        layers=table.n_layers,
        d_model=table.d_model,
        neurons_per_layer=next((width for width in wide if width), 4 * table.d_model),
    )


def _refuse_strangers(out: Storage, prefix: str, kind: str, sae_id: str) -> None:
    """An export replaces one of the same SAE and format, and is written into nothing else."""
    found = read_json(out, _key(prefix, MANIFEST))
    same = found is not None and (found.get("kind"), found.get("sae")) == (kind, sae_id)
    if not same and out.list(prefix):
        raise UserError(
            f"{out.uri}{'/' if prefix else ''}{prefix} holds something else already; give --out another folder."
        )


def _key(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name
