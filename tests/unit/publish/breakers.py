"""One way to break a folder for each check. Weights that are changed are signed again, as a forger would."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tests.unit.publish.folders import (
    EVALUATION,
    get_json,
    npy,
    png,
    put_json,
    put_manifest,
    put_rows,
    rows_of,
    sha256,
    sign,
    weights_of,
)

Breaker = Callable[[Path], None]
WEIGHTS, SPARSITY = "sae_weights.safetensors", "sparsity.safetensors"
DASHBOARDS = "exports/neuronpedia/dashboards"
SOURCE = "exports/neuronpedia/v1/phi-2/1-mdc-mlp-40"


def without(name: str) -> Breaker:
    def breaker(folder: Path) -> None:
        (folder / name).unlink()

    return breaker


def text(name: str, content: str | bytes) -> Breaker:
    def breaker(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if name in ("cfg.json", WEIGHTS, SPARSITY):
            sign(folder)

    return breaker


def changed(name: str, path: str, value: Any) -> Breaker:
    """A value of a JSON file, by its dotted path; the file is then signed again."""

    def breaker(folder: Path) -> None:
        tree = get_json(folder / name)
        place, *sections = tree, *path.split(".")
        for section in sections[:-1]:
            place = place[section]
        if value is GONE:
            del place[sections[-1]]
        else:
            place[sections[-1]] = value
        put_json(folder / name, tree)
        if name == "cfg.json":
            sign(folder)

    return breaker


GONE = object()


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Breaker:
    def breaker(folder: Path) -> None:
        found = weights_of(folder)
        change(found)
        (folder / WEIGHTS).write_bytes(save({name: value.contiguous() for name, value in found.items()}))
        sign(folder)

    return breaker


def sparsity(change: Callable[[Tensor], dict[str, Tensor]]) -> Breaker:
    def breaker(folder: Path) -> None:
        found = load_file(folder / SPARSITY)["sparsity"].clone()
        (folder / SPARSITY).write_bytes(save(change(found)))
        sign(folder)

    return breaker


def table(name: str, change: Callable[[pa.Table], pa.Table]) -> Breaker:
    """A parquet file of the features, with its checksum."""

    def breaker(folder: Path) -> None:
        (manifest,) = folder.glob("features/*/manifest.json")
        file, buffer = manifest.with_name(name), io.BytesIO()
        pq.write_table(change(pq.read_table(file)), buffer)
        file.write_bytes(buffer.getvalue())
        document = get_json(manifest)
        document["files"][name]["sha256"] = sha256(file)
        put_json(manifest, document)

    return breaker


def column(name: str, change: Callable[[list[Any]], Any]) -> Callable[[pa.Table], pa.Table]:
    """A table with one column changed in place."""

    def breaker(found: pa.Table) -> pa.Table:
        values, index = found[name].to_pylist(), found.column_names.index(name)
        change(values)
        return found.set_column(index, found.schema.field(name), pa.array(values, found.schema.field(name).type))

    return breaker


def manifest_of_features(path: str, value: Any) -> Breaker:
    def breaker(folder: Path) -> None:
        (manifest,) = folder.glob("features/*/manifest.json")
        changed(manifest.relative_to(folder).as_posix(), path, value)(folder)

    return breaker


def exported(name: str, change: Callable[[Path], Any]) -> Breaker:
    """A file of an export, with its manifest."""

    def breaker(folder: Path) -> None:
        change(folder / name)
        kind = name.split("/")[1]
        put_manifest(folder / "exports" / kind, kind)

    return breaker


def saved(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """sae_model.pt with its content changed in place."""

    def breaker(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return breaker


def listed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def breaker(path: Path) -> None:
        content = get_json(path)
        change(content)
        put_json(path, content)

    return breaker


def one_row_less(path: Path) -> None:
    """With its activations and its explanation, so that all rules are kept."""
    (gone, *kept) = rows_of(path)
    put_rows(path, kept)
    for name in ("activations", "explanations"):
        file = path.parent.parent / name / path.name
        put_rows(file, [row for row in rows_of(file) if row["index"] != gone["index"]])


def _set(values: list[Any], index: int, value: Any) -> None:
    values[index] = value


def _cut(values: list[list[Any]]) -> None:
    index = next(i for i, value in enumerate(values) if value)
    values[index] = values[index][:-1]


def _times(name: str, factor: float) -> Breaker:
    """A metric, in the record and in its evaluation alike."""

    def breaker(folder: Path) -> None:
        value = get_json(folder / "record.json")["metrics"][name] * factor
        changed("record.json", f"metrics.{name}", value)(folder)
        changed(f"evaluations/{EVALUATION}.json", f"metrics.{name}", value)(folder)

    return breaker


def _both(path: str, value: Any) -> Breaker:
    def breaker(folder: Path) -> None:
        changed("record.json", path, value)(folder)
        changed(f"evaluations/{EVALUATION}.json", path, value)(folder)

    return breaker


def _other_sparsity(log_rate: Tensor) -> dict[str, Tensor]:
    """The same L0 and the same dead features, but rates that two features have exchanged."""
    live = [i for i in range(len(log_rate)) if log_rate[i] > -9]
    a, b = min(live, key=lambda i: log_rate[i]), max(live, key=lambda i: log_rate[i])
    log_rate[[a, b]] = log_rate[[b, a]]
    return {"sparsity": log_rate}


BARE: dict[str, Breaker] = {
    "cfg_is_there": without("cfg.json"),
    "weights_are_there": without(WEIGHTS),
    "sparsity_is_there": without(SPARSITY),
    "record_is_there": without("record.json"),
    "training_is_there": without("training.json"),
    "files_are_data": text("optimizer.pkl", b"\x80\x04."),
    "cfg_is_json": text("cfg.json", '{"d_in": 6,'),
    "cfg_has_its_keys": changed("cfg.json", "dtype", GONE),
    "architecture_is_known": changed("cfg.json", "architecture", "batchtopk"),
    "dtype_is_float32": changed("cfg.json", "dtype", "bfloat16"),
    "scaling_is_folded": changed("cfg.json", "normalize_activations", "expected_average_only_in"),
    "nothing_is_reshaped": changed("cfg.json", "reshape_activations", "hook_z"),
    "b_dec_is_applied": changed("cfg.json", "apply_b_dec_to_input", False),
    "saelens_version_is_named": changed("cfg.json", "metadata.sae_lens_version", None),
    "prepend_bos_is_told": changed("cfg.json", "metadata.prepend_bos", None),
    "context_size_is_told": changed("cfg.json", "metadata.context_size", 0),
    "hook_is_named": changed("cfg.json", "metadata.hook_layer", 7),
    "weights_can_be_read": text(WEIGHTS, b"\x08\0\0\0\0\0\0\0{}      "[:12]),
    "tensors_are_those_of_the_architecture": weights(lambda w: w.update(scaling_factor=w["b_enc"].clone())),
    "shapes_fit": weights(lambda w: w.update(W_enc=w["W_enc"].T)),
    "tensors_are_float32": weights(lambda w: w.update(b_enc=w["b_enc"].double())),
    "weights_are_finite": weights(lambda w: w["W_dec"].view(-1)[:1].fill_(float("nan"))),
    "decoder_rows_have_norm_1": weights(lambda w: w["W_dec"][3].mul_(1.01)),
    "encoder_columns_are_not_zero": weights(lambda w: w["W_enc"][:, 4].zero_()),
    "thresholds_are_not_negative": weights(lambda w: w["threshold"][2:3].fill_(-0.1)),
    "sparsity_can_be_read": sparsity(lambda s: {"sparsity": s, "more": s.clone()}),
    "sparsity_is_one_a_feature": sparsity(lambda s: {"sparsity": s.double()}),
    "sparsity_is_in_range": sparsity(lambda s: {"sparsity": s.where(s > -9.5, -12)}),
    "sparsity_agrees_with_the_record": sparsity(lambda s: {"sparsity": s.where(s < -9, s.flip(0).clamp(min=-3))}),
    "record_is_json": text("record.json", '{"l0": NaN}'),
    "record_version_is_known": changed("record.json", "v", 2),
    "record_id_is_the_folder": changed("record.json", "id", "another"),
    "record_hook_is_that_of_cfg": changed("record.json", "layer", 2),
    "record_widths_are_those_of_cfg": changed("record.json", "d_in", 7),
    "record_settings_are_valid": changed("record.json", "sae.bandwidth", -1.0),
    "metrics_are_there": _both("metrics.ce_recovered", GONE),
    "metrics_are_in_range": _both("metrics.kl_recovered", 1.5),
    "density_counts_every_feature": _both("metrics.density.never", 99),
    "lineage_is_complete": changed("record.json", "lineage.code", {}),
    "model_has_a_digest": changed("record.json", "lineage.model.digest", "latest"),
    "files_are_those_recorded": changed("record.json", "files", {}),
    "origin_can_be_rebuilt": changed("record.json", "config.harvest.hooks", ["model.layers.2.mlp"]),
    "training_is_json": text("training.json", "[]"),
    "training_is_of_these_weights": changed("training.json", "weights_sha256", "00" * 32),
    "curve_is_whole": changed("training.json", "history.loss", [1.0]),
    "evaluation_is_there": without(f"evaluations/{EVALUATION}.json"),
    "evaluation_is_that_of_the_record": changed(f"evaluations/{EVALUATION}.json", "metrics.mse", 7.0),
}
"""Check -> what breaks it, of an SAE by itself."""

FULL: dict[str, Breaker] = {
    "l0_is_measured_again": _times("l0", 1.002),
    "fvu_is_measured_again": _times("fvu", 1.002),
    "cosine_is_measured_again": _times("cosine", 0.998),
    "firing_rates_are_measured_again": sparsity(_other_sparsity),
    "features_are_of_this_sae": manifest_of_features("sae", "another"),
    "feature_files_are_those_of_the_manifest": manifest_of_features("files", {"features.parquet": {"sha256": "0"}}),
    "feature_columns_have_their_types": table(
        "features.parquet", lambda t: t.set_column(5, "std", t["std"].cast(pa.float64()))
    ),
    "each_feature_has_a_row": table("features.parquet", lambda t: t.slice(0, 39)),
    "firing_rates_are_shares": table("features.parquet", column("firing_rate", lambda v: _set(v, 3, 1.5))),
    "maxima_fit_counts": table("features.parquet", column("max", lambda v: _set(v, 0, 2.0))),
    "feature_lists_are_equally_long": table("features.parquet", column("pos_tokens", _cut)),
    "contexts_belong_to_features": table("contexts.parquet", column("feature", lambda v: _set(v, -1, 40))),
    "context_lists_are_equally_long": table("contexts.parquet", column("tokens", _cut)),
    "context_values_are_at_their_place": table("contexts.parquet", column("value", lambda v: _set(v, 0, 99.0))),
    "saelens_export_is_whole": text("exports/saelens/cfg.json.bak.json", "{}"),
    "saelens_export_is_this_sae": exported("exports/saelens/cfg.json", listed(lambda cfg: cfg.update(d_sae=41))),
    "neuronpedia_export_is_whole": text(f"{SOURCE}/more.jsonl", "{}"),
    "neuronpedia_rows_follow_the_rules": exported(
        f"{SOURCE}/features/batch-0.jsonl.gz",
        lambda path: put_rows(path, [row | {"hasVector": True} for row in rows_of(path)]),
    ),
    "neuronpedia_export_is_this_sae": exported(f"{SOURCE}/features/batch-0.jsonl.gz", one_row_less),
    "bundle_is_whole": text("exports/bundle/notes.json", "{}"),
    "dashboards_can_be_read": exported(f"{DASHBOARDS}/batch-0.json", lambda path: path.write_text("{")),
    "dashboards_have_their_fields": exported(
        f"{DASHBOARDS}/batch-0.json", listed(lambda found: found["features"][3].update(vector=None))
    ),
    "dashboards_have_each_feature": exported(
        f"{DASHBOARDS}/batch-0.json", listed(lambda found: found["features"].pop())
    ),
    "seed_files_are_there": exported("exports/bundle/top_100_features.json", Path.unlink),
    "seed_model_loads": exported(
        "exports/bundle/sae_model.pt", lambda path: path.write_bytes(path.read_bytes()[:-100])
    ),
    "seed_model_is_sound": exported(
        "exports/bundle/sae_model.pt", saved(lambda c: c["state_dict"].update(b_more=torch.tensor([float("inf")])))
    ),
    "seed_model_is_this_sae": exported(
        "exports/bundle/sae_model.pt", saved(lambda c: c["state_dict"]["W_enc"].add_(0.1))
    ),
    "decoder_array_is_the_decoder": exported(
        "exports/bundle/decoder_weights.npy", lambda path: path.write_bytes(npy([[1.0] * 6] * 40))
    ),
    "analysis_has_every_feature": exported(
        "exports/bundle/feature_analysis.json", listed(lambda found: found["features"].append(found["features"][1]))
    ),
    "top_features_are_features": exported(
        "exports/bundle/top_100_features.json", listed(lambda found: found[0].update(feature_idx=40))
    ),
    "seed_metadata_fits": exported(
        "exports/bundle/neuronpedia_metadata.json", listed(lambda found: found.update(d_sae=41))
    ),
    "pictures_are_whole": exported(
        "exports/bundle/visualizations/density.png", lambda path: path.write_bytes(png()[:-20] + b"\0" * 20)
    ),
}
"""Of an SAE with its activations, features and exports."""

TOPK: dict[str, Breaker] = {"k_is_possible": changed("cfg.json", "k", 0)}
"""Of a TopK SAE."""

ALSO = {"l0_is_measured_again": ["sparsity_agrees_with_the_record"]}
"""Checks that rightly fail together with one: L0 is the sum of the firing rates."""
