"""W_U, the matrix from the residual stream to logits, read from a model's weights without loading the model."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from midiscover.models import ModelIdentity, model_folder

_OUTPUT = ("lm_head.weight", "embed_out.weight", "output.weight")
_INPUT = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.word_embeddings.weight",
)


def read_unembedding(identity: ModelIdentity) -> Tensor | None:
    """[vocabulary rows, d_model] in the dtype of the file; a tied model's is its embedding. None where it is elsewhere.

    Rows may be more than the tokenizer's ids (phi-2: 51,200).
    """
    folder = model_folder(identity)
    places = _places(folder)
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)
    for name in (*_OUTPUT, *(_INPUT if tied else ())):
        if name in places:
            with safe_open(folder / places[name], "pt") as file:
                return file.get_tensor(name)
    return None


def _places(folder: Path) -> dict[str, str]:
    """Tensor name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found
