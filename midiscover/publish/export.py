"""Exports of one SAE: files first, manifest.json last, so that a folder with a manifest is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import midiscover
from midiscover.config import EXPORTS, NeuronpediaConfig
from midiscover.errors import CorruptError, NotFoundError, UserError
from midiscover.features.records import FeatureRecords, open_features
from midiscover.ids import fingerprint
from midiscover.lm import load_tokenizer
from midiscover.models import ModelIdentity, config_folder, hook_table
from midiscover.origin import resolve_origin
from midiscover.publish.bundle import Bundle
from midiscover.publish.checks_folder import LICENCES
from midiscover.publish.choice import sweep_of, sweep_rows
from midiscover.publish.neuronpedia import ModelFacts, NeuronpediaExport
from midiscover.publish.saelens import saelens_files
from midiscover.saes import CFG, WEIGHTS
from midiscover.store import layout
from midiscover.store.documents import dump, read_json
from midiscover.store.layout import STARTED
from midiscover.store.storage import Storage

VERSION = 2
MANIFEST = "manifest.json"


class Exported(NamedTuple):
    """An export that stands."""

    manifest: dict[str, Any]
    """v, kind, sae, made_of and files: sha256 and bytes of each."""
    is_new: bool
    """False: the same export stood there already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What is to be written of an SAE; see `prepare_export`."""

    storage: Storage
    record: dict[str, Any]
    kind: str
    neuronpedia: NeuronpediaExport
    records: FeatureRecords | None
    """The feature records; None for a kind that needs none."""
    decode: Callable[[list[int]], str]
    """Token ids to their text, for a bundle."""
    rows: list[dict[str, Any]]
    """The SAEs of its sweep, for a bundle."""
    licence: str | None = None
    """For the card of a SAELens folder."""
    made_of: str
    """Changes with everything that the files depend on."""

    def files(self) -> Iterable[tuple[str, bytes]]:
        """Names and contents."""
        names = self.neuronpedia
        if self.records is None:
            named = f"{names.model}/{names.source}"
            family, repository = names.facts.model_type, names.repository
            found = saelens_files(self.storage, self.record, family, named, repository, self.licence)
            return found.items()
        if self.kind == "neuronpedia":
            return names.files(self.records)
        return Bundle(self.storage, self.record, self.records, names, self.decode, self.rows).files()


def prepare_export(
    storage: Storage,
    sae_id: str,
    kind: str,
    names: NeuronpediaConfig | None = None,
    *,
    repository: str | None = None,
    licence: str | None = None,
    model: str | None = None,
) -> Export:
    """Everything that an export needs, looked up; writes nothing.

    repository: `org/repo` of a hub to which the SAE is pushed. licence: for the card of a SAELens folder. model: the
    folder of its language model, of which the config is read, where that lies elsewhere than the record says.
    UserError where a name is not one of Neuronpedia's; NotFoundError where the feature records that an export needs
    are not made yet.
    """
    if kind not in EXPORTS:
        raise UserError(f"'{kind}' is no export format; known are {', '.join(EXPORTS)}.")
    record, cfg = (read_json(storage, key) for key in (layout.record(sae_id), layout.sae_file(sae_id, CFG)))
    if record is None or cfg is None:
        raise NotFoundError(f"There is no finished SAE '{sae_id}' in {storage.uri}.")
    names = names or NeuronpediaConfig()
    identity = resolve_origin(record, storage.uri, model)
    neuronpedia = NeuronpediaExport(record, cfg, _facts(identity), names, repository)
    records = open_features(storage, sae_id) if kind != "saelens" else None
    explained = records.explanations if records and kind == "neuronpedia" else {}
    said = {str(feature): found.text for feature, found in explained.items()}
    sweep = sweep_of(storage, sae_id) if kind == "bundle" else None
    rows = sweep_rows(storage, sweep) if sweep else []
    made_of = fingerprint(
        "export",
        VERSION,
        {
            "kind": kind,
            "record": hashlib.sha256(dump(record)).hexdigest(),
            "features": records.manifest["files"] if records else None,
            "names": asdict(names),
            "called": [neuronpedia.model, neuronpedia.source],
            "repository": repository,
            "rows": rows,
            "version": midiscover.__version__,
        }
        | ({"licence": licence} if licence and kind == "saelens" else {})
        | ({"explanations": said} if said else {}),
    )
    return Export(
        storage=storage,
        record=record,
        kind=kind,
        neuronpedia=neuronpedia,
        records=records,
        decode=_decoder(identity),
        rows=rows,
        licence=licence,
        made_of=made_of,
    )


def write_export(export: Export, out: Storage, prefix: str = "", *, force: bool = False) -> Exported:
    """Write an export below `prefix` of `out`. A finished equal one is left as it is, unless `force`.

    UserError where something else stands there than an export of this SAE in this format; CorruptError where its
    weights are not those that were committed.
    """
    sae, kind = export.record["id"], export.kind
    standing, mine, others = _standing(out, prefix, kind, sae)
    if standing and standing.get("made_of") == export.made_of and not force and _is_whole(out, prefix, standing):
        out.delete(_key(prefix, STARTED))
        return Exported(standing, False)
    out.write(_key(prefix, STARTED), dump({"v": VERSION, "kind": kind, "sae": sae, "others": sorted(others)}))
    out.delete(_key(prefix, MANIFEST))
    files = {}
    for name, data in export.files():
        digest = hashlib.sha256(data).hexdigest()
        if name == WEIGHTS:
            _refuse_damage(export, digest)
        out.write(_key(prefix, name), data)
        files[name] = {"sha256": digest, "bytes": len(data)}
    for name in mine - {*files, MANIFEST, STARTED}:
        out.delete(_key(prefix, name))
    manifest = {"v": VERSION, "kind": kind, "sae": sae, "made_of": export.made_of, "files": files}
    out.write(_key(prefix, MANIFEST), dump(manifest))
    out.delete(_key(prefix, STARTED))
    return Exported(manifest, True)


def export_files(out: Storage, prefix: str, manifest: dict[str, Any]) -> dict[str, bytes]:
    """The files of an export that stands. CorruptError where one is not what its manifest says."""
    files = {name: out.read(_key(prefix, name)) for name in manifest["files"]}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
            raise CorruptError(f"{name} in {out.uri}/{prefix} is not the file that was written; export with --force.")
    return files


def _decoder(identity: ModelIdentity) -> Callable[[list[int]], str]:
    """Token ids to their text; the tokenizer is loaded when the first are asked for."""
    tokenizer = cache(partial(load_tokenizer, identity))
    return lambda ids: str(tokenizer().decode(ids, clean_up_tokenization_spaces=False))


def _facts(identity: ModelIdentity) -> ModelFacts:
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


class _Standing(NamedTuple):
    """What lies where an export is to be written."""

    manifest: dict[str, Any] | None
    """Of the finished export."""
    mine: set[str]
    """Names of files that belong to it, or to an interrupted one."""
    others: set[str]
    """Names of files that were put beside it, which stay."""


def _standing(out: Storage, prefix: str, kind: str, sae: str) -> _Standing:
    """UserError where anything but an export of this SAE in this format stands there."""
    manifest, started = (read_json(out, _key(prefix, name)) for name in (MANIFEST, STARTED))
    found = {key.removeprefix(f"{prefix}/") for key in out.list(prefix)}
    if _is_ours(started, kind, sae):
        others = found & {*LICENCES, *(started or {}).get("others", ())}
        return _Standing(manifest, found - others, others)
    if manifest is not None and _is_ours(manifest, kind, sae):
        mine = {*manifest["files"], MANIFEST, STARTED}
        return _Standing(manifest, mine, found - mine)
    if found:
        place = f"{out.uri}{'/' if prefix else ''}{prefix}"
        raise UserError(f"{place} holds something else already; give --out another folder.")
    return _Standing(None, set(), set())


def _is_ours(word: Any, kind: str, sae: str) -> bool:
    return isinstance(word, dict) and (word.get("kind"), word.get("sae")) == (kind, sae)


def _is_whole(out: Storage, prefix: str, manifest: dict[str, Any]) -> bool:
    return {_key(prefix, name) for name in manifest["files"]} <= set(out.list(prefix))


def _refuse_damage(export: Export, digest: str) -> None:
    if digest != export.record["files"][WEIGHTS]:
        raise CorruptError(
            f"The weights of {export.record['id']} in {export.storage.uri} differ from those that were committed."
        )


def _key(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name
