"""What the real SAELens computes of a folder: a program of its own, run by a Python that has SAELens.

    python -I saelens_probe.py FOLDER GIVEN.safetensors ANSWER.safetensors

GIVEN holds `x` [tokens, d_in] and `features` [tokens, d_sae]. Knows nothing of miDiscover.
"""

import sys

import sae_lens  # pyright: ignore[reportMissingImports]
import torch
from safetensors.torch import load_file, save_file


def main(folder: str, given: str, answer: str) -> None:
    """Load, encode, decode, write down."""
    tensors = load_file(given)
    with torch.no_grad():
        sae = sae_lens.SAE.load_from_disk(folder)
        found = {"features": sae.encode(tensors["x"]), "x_hat": sae.decode(tensors["features"])}
    save_file({name: value.float().contiguous() for name, value in found.items()}, answer)
    print(sae_lens.__version__, type(sae).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
