"""An SAE as it stands in a store, with all that can be verified of it, written without the code that writes it.

Of 40 features on 6 dimensions: its harvest, its feature records, and its exports, that of the seed project included.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from midiscover.config import NeuronpediaConfig, RunConfig
from midiscover.configio import to_tree
from midiscover.features.collect import collect_chunk
from midiscover.features.finish import Finisher
from midiscover.features.records import open_features
from midiscover.publish.neuronpedia import ModelFacts, NeuronpediaExport
from midiscover.sae.base import Sae
from midiscover.sae.metrics import density
from midiscover.sae.registry import folded_sae
from midiscover.saeconfig import JumpReluConfig, SaeConfig, StandardConfig, TopKConfig
from midiscover.store.loader import iterate_rows
from tests.harvests import HARVEST, HOOK
from tests.unit.features.naive import D_IN, D_SAE, World, make_world, strings

SAE = "l1.mlp-in.jumprelu-40.l0c-1.0123456789"
EVALUATION = "e.0123456789"
SETTINGS: dict[str, SaeConfig] = {
    "jumprelu": JumpReluConfig(d_sae=D_SAE),
    "topk": TopKConfig(d_sae=D_SAE, k=5),
    "standard": StandardConfig(d_sae=D_SAE),
}


def write_sae(store: Path, kind: str = "jumprelu") -> Path:
    """The folder of an SAE in a store, whose held-out activations lie there as well."""
    world = make_world(store)
    sae = sae_of(world.sae, kind)
    folder = store / "saes" / SAE
    folder.mkdir(parents=True)
    put_json(folder / "cfg.json", cfg_of(sae, kind))
    weights = {name: value.detach().contiguous() for name, value in sae.state_dict().items()}
    (folder / "sae_weights.safetensors").write_bytes(save(weights))
    metrics, rate = measure(world, sae)
    log_rate = torch.tensor([np.log10(r + 1e-10) for r in rate.tolist()], dtype=torch.float32)
    (folder / "sparsity.safetensors").write_bytes(save({"sparsity": log_rate}))
    put_json(folder / "training.json", training())
    (folder / "evaluations").mkdir()
    put_json(folder / "evaluations" / f"{EVALUATION}.json", {"v": 1, "id": SAE, "metrics": metrics})
    put_json(folder / "record.json", record_of(kind, metrics))
    sign(folder)
    return folder


def add_features(store: Path, folder: Path) -> None:
    """Feature records of the SAE, as a run would write them."""
    world = make_world(store)
    sae = folded_sae(get_json(folder / "cfg.json"), weights_of(folder)).eval()
    part = collect_chunk(world.storage, {"sae": sae}, world.plan, world.plan.blocks)["sae"]
    lens = torch.randn(30, sae.W_dec.shape[1], generator=torch.Generator().manual_seed(1))
    corpus: Any = world.corpus
    Finisher(
        storage=world.storage,
        sae_id=folder.name,
        sae=sae,
        plan=world.plan,
        corpus=corpus,
        strings=strings,
        unembedding=lens,
    ).finish(part)


def add_exports(store: Path, folder: Path) -> None:
    """As saelens, as neuronpedia, and as the seed project writes."""
    record, cfg = get_json(folder / "record.json"), get_json(folder / "cfg.json")
    names = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    put_export(folder / "exports" / "saelens", "saelens", {name: (folder / name).read_bytes() for name in names})
    facts = ModelFacts(name="microsoft/phi-2", model_type="phi", layers=32, d_model=D_IN, neurons_per_layer=24)
    export = NeuronpediaExport(record, cfg, facts, NeuronpediaConfig(source_set="mdc-mlp-40"))
    rows = dict(export.files(open_features(make_world(store).storage, folder.name)))
    batch: dict[str, Any] = {"model_id": "phi-2", "layer": 1, "sae_set": "mdc-mlp-40", "sae_id_suffix": None}
    batch["features"] = [dashboard(index) for index in range(D_SAE)]
    rows |= {"dashboards/batch-0.json": json.dumps(batch).encode()}
    put_export(folder / "exports" / "neuronpedia", "neuronpedia", rows)
    put_manifest(write_bundle(folder / "exports" / "bundle", cfg, weights_of(folder)), "bundle")


def dashboard(index: int) -> dict[str, Any]:
    """A feature as SAEDashboard 0.8.0 writes it, with one activation."""
    activation = {
        "bin_min": -1,
        "bin_max": 2.2,
        "bin_contains": -1,
        "tokens": ["a", "b"],
        "values": [0.0, 2.2],
        "qualifying_token_index": 1,
    }
    return {
        "feature_index": index,
        "neuron_alignment_indices": [1, 2, 3],
        "neuron_alignment_values": [0.3, 0.2, 0.1],
        "neuron_alignment_l1": [0.03, 0.02, 0.01],
        "correlated_neurons_indices": [1, 2, 3],
        "correlated_neurons_l1": [0.3, 0.2, 0.1],
        "correlated_neurons_pearson": [0.3, 0.2, 0.1],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": ["x"],
        "neg_values": [-0.7],
        "pos_str": ["y"],
        "pos_values": [3.7],
        "frac_nonzero": 0.0002,
        "freq_hist_data_bar_values": [0.02, 0.06],
        "freq_hist_data_bar_heights": [47, 32],
        "logits_hist_data_bar_heights": [5, 35],
        "logits_hist_data_bar_values": [-0.6, -0.5],
        "n_prompts_total": 24,
        "n_tokens_in_prompt": 8,
        "dataset": "builtin",
        "decoder_weights_dist": [],
        "activations": [activation],
        "vector": [],
    }


def write_bundle(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor], *, own: bool = True) -> Path:
    """The seed project's files; own: state_dict under SAELens' names, else the seed's own linear layers."""
    (folder / "visualizations").mkdir(parents=True)
    config = {
        "d_model": D_IN,
        "d_hidden": D_SAE,
        "model_name": "microsoft/phi-2",
        "layer_name": "model.layers.16.mlp.fc2",
    }
    linear = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
        "decoder.bias": weights["b_dec"],
    }
    content = {"state_dict": weights, "config": cfg} if own else {"model_state_dict": linear, "config": config}
    torch.save(content, folder / "sae_model.pt")
    np.save(folder / "decoder_weights.npy", (weights["W_dec"] if own else weights["W_dec"].T).numpy())
    features = [{"feature_idx": i, "max_activation": 1.0, "activation_frequency": 1 / (1 + i)} for i in range(D_SAE)]
    about = {"model_name": "microsoft/phi-2", "layer_name": HOOK, "d_model": D_IN, "d_hidden": D_SAE}
    put_json(folder / "feature_analysis.json", about | {"features": features})
    put_json(folder / "top_100_features.json", features[:10])
    metadata = {"model_name": "microsoft/phi-2", "layer": HOOK, "d_model": D_IN, "d_sae": D_SAE}
    put_json(folder / "neuronpedia_metadata.json", metadata)
    (folder / "visualizations" / "density.png").write_bytes(png())
    return folder


def sae_of(standard: Sae, kind: str) -> Sae:
    """The weights of the standard SAE under another architecture."""
    weights = dict(standard.state_dict())
    if kind == "jumprelu":
        weights["threshold"] = torch.linspace(0, 0.5, D_SAE)
    return folded_sae({"architecture": kind, "d_in": D_IN, "d_sae": D_SAE, "k": 5}, weights).eval()


def cfg_of(sae: Sae, kind: str) -> dict[str, Any]:
    return {
        "architecture": kind,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        **sae.saelens_fields(),
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": "microsoft/phi-2",
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": HOOK,
            "hook_layer": 1,
            "prepend_bos": False,
            "context_size": 8,
        },
    }


def measure(world: World, sae: Sae) -> tuple[dict[str, Any], Tensor]:
    """L0, FVU and the rest in a plain loop over held-out rows, and [d_sae] firing rates."""
    x = torch.cat(list(iterate_rows(world.storage, world.plan.manifest, "held_out", 1000))).float()
    with torch.no_grad():
        codes = sae.encode(x)
        y = sae.decode(codes)
    rate = (codes > 0).double().mean(0)
    mean = torch.tensor(world.plan.manifest.mean)
    residual, total = (x.double() - y.double()).square().sum(), (x.double() - mean.double()).square().sum()
    metrics: dict[str, Any] = {
        "tokens": len(x),
        "l0": float(rate.sum()),
        "fvu": float(residual / total),
        "mse": float(residual / x.numel()),
        "cosine": float(torch.cosine_similarity(x.double(), y.double(), dim=-1).mean()),
        "dead_share": float((rate == 0).double().mean()),
        "inactive_share": float((rate <= 1e-3).double().mean()),
        "density": density(rate),
        "ce_clean": 3.0,
        "ce_zero": 4.0,
        "ce_sae": 3.1,
        "ce_recovered": 0.9,
        "kl_zero": 1.0,
        "kl_sae": 0.1,
        "kl_recovered": 0.9,
    }
    return metrics, rate


def training() -> dict[str, Any]:
    history = {"step": [0, 10], "tokens": [0, 1280], "loss": [2.0, 1.0], "fvu": [1.0, None]}
    return {"v": 1, "id": SAE, "history": history, "weights_sha256": "", "normalisation": {"mean_norm": 3.0}}


def record_of(kind: str, metrics: dict[str, Any]) -> dict[str, Any]:
    config = to_tree(RunConfig())
    config["harvest"]["hooks"] = [HOOK]
    digest = "0f" * 20
    return {
        "v": 1,
        "id": SAE,
        "created": "2026-11-25T10:00:00+00:00",
        "hook": HOOK,
        "output_hook": HOOK,
        "layer": 1,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "kind": kind,
        "sae": to_tree(SETTINGS[kind]),
        "train": {"epochs": 2, "seed": 0},
        "evaluation_id": EVALUATION,
        "config": {name: config[name] for name in ("model", "corpus", "harvest", "evaluate")},
        "metrics": metrics | {"dead_in_window_share": None},
        "lineage": {
            "model": {"name": "microsoft/phi-2", "digest": digest, "revision": digest, "dtype": "float32"},
            "corpus": {"id": "c.test", "source": "builtin", "revision": None},
            "harvest": HARVEST,
            "seed": 0,
            "code": {"version": "0.1.0", "commit": None},
            "versions": {"torch": "2.13.0"},
        },
        "files": {},
    }


def sign(folder: Path) -> None:
    """Make the checksums those of the files that are there."""
    record, curve = get_json(folder / "record.json"), get_json(folder / "training.json")
    names = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    record["files"] = {name: sha256(folder / name) for name in names if (folder / name).exists()}
    put_json(folder / "record.json", record)
    if (folder / "sae_weights.safetensors").exists():
        put_json(folder / "training.json", curve | {"weights_sha256": sha256(folder / "sae_weights.safetensors")})


def put_export(folder: Path, kind: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    put_manifest(folder, kind)


def put_manifest(folder: Path, kind: str) -> None:
    """Of the files that are there."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    files = {path.relative_to(folder).as_posix(): {"sha256": sha256(path)} for path in paths}
    put_json(folder / "manifest.json", {"v": 1, "kind": kind, "sae": SAE, "files": files})


def weights_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(folder / "sae_weights.safetensors").items()}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Of a batch of the Neuronpedia export."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().rstrip("\n").split("\n")]


def put_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def png() -> bytes:
    """One black pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def get_json(path: Path) -> Any:
    return json.loads(path.read_text())


def put_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
