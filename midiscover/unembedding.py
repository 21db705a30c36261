"""W_U, the matrix from the residual stream to logits, read from a model's files without loading the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from midiscover.modelfiles import weight_files
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
    """[vocabulary rows, d_model] in the dtype of the file; a tied model's is its embedding.

    A model that calls it by none of the names above is loaded whole to find it; None where it has no such matrix. Rows
    may be more than the tokenizer's ids (phi-2: 51,200).
    """
    folder = model_folder(identity)
    places = _places(folder)
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", True)
    for name in (*_OUTPUT, *(_INPUT if tied else ())):
        if name in places:
            with safe_open(folder / places[name], "pt") as file:
                return file.get_tensor(name)
    from midiscover.lm import LanguageModel  # transformers takes seconds to import

    found: Any = LanguageModel.load(identity, dtype="float32", attention="eager").model.get_output_embeddings()
    return None if found is None else found.weight.detach()


def _places(folder: Path) -> dict[str, str]:
    """Tensor name -> the file that holds it."""
    found: dict[str, str] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found
