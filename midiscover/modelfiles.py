"""Model files on this machine: what a model folder must hold, downloads from a hub, conversions. Loads no torch.

Knows files and commits, nothing of what is in them; `models.py` makes identities of them. What has to look inside a
model runs in a process of its own, through `run_module`.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from midiscover.errors import ModelError

HUB_SECONDS = 3.0
"""How long a hub may take to name a commit."""

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format allows no longer header."""

NAME_FILE = "midiscover_model.json"
"""{name, source, licence} in a model folder: what the model is called in records, where its folder's name says less."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = ("config.json", "generation_config.json", "chat_template.jinja", *TOKENIZER_FILES)
"""Beside its weights. A chat's template stands by itself since transformers 5, and is no part of the tokenizer here: no
corpus depends on it."""
# Weights by the two names that transformers itself loads: some hubs hold further copies in other layouts.
WEIGHT_FILES = ("model*.safetensors", INDEX_FILE)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. ModelError where there are none, or a listed one is missing.

    A single file comes before an index, as transformers has it.
    """
    index, names = folder / INDEX_FILE, [SINGLE_FILE]
    if index.is_file() and not (folder / SINGLE_FILE).is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"Model folder {folder} lacks {missing[0]}; it must hold config.json, a tokenizer and safetensors weights."
        )
    return [folder / name for name in names]


def weight_names(read: Callable[[str, int, int | None], bytes]) -> list[str]:
    """Names of a model's tensors, from the index or the header of its safetensors; [] where neither can be read.

    `read(file name, start, length)` reads of the model's folder, wherever that is; no weights are read.
    """
    try:
        try:
            length = int.from_bytes(read(SINGLE_FILE, 0, 8), "little")
        except FileNotFoundError:
            return list(json.loads(read(INDEX_FILE, 0, None))["weight_map"])
        header = json.loads(read(SINGLE_FILE, 8, min(length, MAX_HEADER_BYTES)))
        return [name for name in header if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that make the tokenizer of a model folder. ModelError where there are none."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise ModelError(f"Model folder {folder} holds no tokenizer; save the model's tokenizer into it.")
    return files


def run_module(module: str, *args: str) -> str:
    """Run a module of this package as a process of its own; returns the last line it printed.

    The child answers in JSON; `{"error": …}` becomes a ModelError here.
    """
    package_parent = str(Path(__file__).resolve().parent.parent)
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    answer = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0:
        reason = (done.stderr.strip() or answer or f"exit code {done.returncode}").rpartition("\n")[2]
        raise ModelError(json.loads(answer)["error"] if answer.startswith('{"error"') else f"{module} failed: {reason}")
    return answer


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make(temporary folder)` where it is not there yet; safe under several processes at once."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            temporary = folder.parent / f".making-{folder.name}"
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed: the lock is ours
            temporary.mkdir()
            try:
                made = temporary / folder.name
                make(made)
                made.replace(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def convert_gguf(gguf: Path, folder: Path, *, name: str, source: str, licence: str | None) -> None:
    """Turn a GGUF file into a plain safetensors folder, in a process of its own (20 s for 135M parameters)."""
    about = {"name": name, "source": source, "licence": licence}
    run_module("midiscover.lm", "convert", str(gguf), str(folder), json.dumps(about))


class HubSilentError(Exception):
    """The hub did not name a commit: what it did instead, to be read after "the hub"."""


def hub_commit(hub_id: str, revision: str | None) -> str:
    """The commit that a hub id and revision mean now. ModelError: not on the hub, or only for those it lets in.

    HubSilentError: no answer in time, or a refusal that says nothing of the model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    answers: queue.Queue[str | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(HfApi().model_info(hub_id, revision=revision, timeout=HUB_SECONDS).sha or "")
        except Exception as error:  # handed to the caller's thread below
            answers.put(error)

    # The client's timeout does not cover name resolution: a thread of our own that may be left behind does.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=HUB_SECONDS + 0.5)
    except queue.Empty:
        raise HubSilentError(f"does not answer (no reply in {HUB_SECONDS + 0.5:.0f} s)") from None
    if isinstance(answer, RevisionNotFoundError):
        raise ModelError(f"Hub model {hub_id!r} has no revision {revision!r}; give a branch, tag or commit of it.")
    if isinstance(answer, GatedRepoError):
        raise _gated(hub_id)
    if isinstance(answer, RepositoryNotFoundError):
        raise ModelError(f"Hub model {hub_id!r} does not exist, or needs an access token (HF_TOKEN) that may read it.")
    if isinstance(answer, HfHubHTTPError) and answer.response.status_code in (401, 403):
        raise HubSilentError(
            f"refuses ({answer.response.status_code}: the access token, HF_TOKEN, is wrong, has expired or may not "
            "read it, or a proxy stands between)"
        ) from answer
    if isinstance(answer, Exception):
        said = str(answer).partition("\n")[0] or type(answer).__name__
        raise HubSilentError(
            f"{'refuses' if isinstance(answer, HfHubHTTPError) else 'does not answer'} ({said})"
        ) from answer
    return answer


def _gated(hub_id: str) -> ModelError:
    return ModelError(
        f"The hub gives model {hub_id!r} only to those it has let in: ask for access on its page, and set HF_TOKEN."
    )


def download(hub_id: str, revision: str, patterns: Sequence[str], *, into: Path | None = None) -> Path:
    """Fetch files to the hub cache (each once per machine: the client locks) or to a folder `into`; returns the folder.

    In the hub cache the folder's name is the commit. ModelError where they can't be had.
    """
    from huggingface_hub.errors import GatedRepoError

    try:
        return _snapshot(hub_id, revision, patterns, local_dir=into, etag_timeout=HUB_SECONDS)
    except GatedRepoError as error:
        raise _gated(hub_id) from error
    except Exception as error:  # whatever ends a download, the way out is the same
        reason = str(error).partition("\n")[0]
        raise ModelError(f"Model {hub_id!r} at {revision[:12]} could not be downloaded: {reason}") from error


def cached_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the hub cache, perhaps incomplete; its name is the commit."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Only what `download` fetches: a snapshot without the rest of the repository counts as incomplete.
        return _snapshot(hub_id, revision, MODEL_FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _snapshot(hub_id: str, revision: str | None, patterns: Sequence[str], **how: Any) -> Path:
    """Files of a repository by these patterns, none of its folders'; `how` is snapshot_download's."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # into logs they would go as lines
    given = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"], **how}
    return Path(snapshot_download(hub_id, revision=revision, **given))


def has_weights(folder: Path) -> bool:
    """Whether all of a folder's weights are there."""
    try:
        return bool(weight_files(folder))
    except ModelError:
        return False
