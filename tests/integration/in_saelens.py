"""What the real SAELens makes of SAE folders. Runs in SAELens' own environment and knows nothing of miDiscover.

    python in_saelens.py REQUEST.json ANSWERS_FOLDER

The request holds `saes`, a list of {"folder", "input"}: a folder, and a safetensors file with `x` [..., d_in] and
`features` [..., d_sae]; and `model`, {"folder", "input", "hook"}: a language model and a file with `ids` [b, t]. It is
answered by answers.json, by <i>.safetensors for each SAE and by model.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import sae_lens  # pyright: ignore[reportMissingImports]
import torch
from sae_lens.load_model import load_model  # pyright: ignore[reportMissingImports]
from sae_lens.loading import pretrained_sae_loaders as loaders  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file

METADATA = (
    "hook_name",
    "hook_layer",
    "hook_name_out",
    "model_class_name",
    "context_size",
    "prepend_bos",
    "model_name",
    "dataset_path",
    "training_architecture",
    "training_architecture_details",
)


def read_sae(folder: Path, given: dict[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What SAELens says of a folder, and what it computes: as loaded, and with its own folding of decoder norms."""
    sae = sae_lens.SAE.load_from_disk(folder)
    folded = sae_lens.SAE.load_from_disk(folder, fold_W_dec_norm=True)
    # Sparsity is read by the loader of hub repositories alone; here the "repository" is the folder's parent.
    loaders.hf_hub_download = lambda repo_id, filename, **_: str(folder.parent / filename)
    *_, sparsity = loaders.sae_lens_huggingface_loader("any/repository", folder.name)
    tensors = {
        "features": sae.encode(given["x"]),
        "x_hat": sae.decode(given["features"]),
        "forward": sae(given["x"]),
        "folded_forward": folded(given["x"]),
        "folded_features": folded.encode(given["x"]),
        "folded_x_hat": folded.decode(given["features"]),
    }
    if sparsity is not None:
        tensors["sparsity"] = sparsity
    facts = {
        "class": type(sae).__name__,
        "architecture": sae.cfg.architecture(),
        "k": getattr(sae.cfg, "k", None),
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "d_out": getattr(sae.cfg, "d_out", sae.cfg.d_in),
        "metadata": {name: getattr(sae.cfg.metadata, name) for name in METADATA},
    }
    return facts, {name: tensor.contiguous() for name, tensor in tensors.items()}


def read_model(request: dict[str, str]) -> torch.Tensor:
    """[b, t, d_in] what a hook of SAELens sees in the model that a `hook_name` of ours belongs to."""
    model = load_model("AutoModelForCausalLM", request["folder"], device="cpu", hook_names=[request["hook"]])
    _, cache = model.run_with_cache(load_file(request["input"])["ids"], names_filter=[request["hook"]])
    return cache[request["hook"]].contiguous()


def main(request_file: str, answers: str) -> None:
    """Answer a request."""
    request = json.loads(Path(request_file).read_text())
    facts = []
    with torch.no_grad():
        for i, sae in enumerate(request["saes"]):
            told, tensors = read_sae(Path(sae["folder"]), load_file(sae["input"]))
            facts.append(told)
            save_file(tensors, Path(answers) / f"{i}.safetensors")
        save_file({"acts": read_model(request["model"])}, Path(answers) / "model.safetensors")
    text = json.dumps({"version": sae_lens.__version__, "saes": facts})
    (Path(answers) / "answers.json").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
