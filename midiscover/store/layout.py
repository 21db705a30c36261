"""Every key of a store, one function per kind, and what a key may look like. No reading, no writing.

A key is a path relative to the store, with `/` between its parts, the same in a folder and in a bucket. `*_folder`
functions return prefixes for `Storage.list`; all others return the key of one object.
"""

from __future__ import annotations

import re

from midiscover.errors import StoreError

MODELS, TEXTS, CORPORA, ACTIVATIONS = "models", "texts", "corpora", "activations"
SAES, SWEEPS, RATES = "saes", "sweeps", "rates"
"""The folders at the top of a store, for `Storage.list`."""
FOLDERS = (MODELS, TEXTS, CORPORA, ACTIVATIONS, SAES, SWEEPS, RATES)
"""All of them; what else lies there is not ours."""

TOKENS = "tokens"
"""Folder, beside the hooks of a harvest, of the token ids, windows and positions that all hooks share."""

STARTED = "unfinished.json"
"""Stands in the folder of a model or an export while it is filled, and names the files there that are not ours."""

PROMOTED = "promoted.json"
"""What a deployment serves."""

TRACKER = "tracker.db"
"""The SQLite tracker of a local store."""


_UNFIT = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Backslashes, which part folders on Windows; control characters and line breaks; surrogates, which stand for bytes of
a file name that is no UTF-8."""


def check_key(key: str) -> str:
    """Return `key` unchanged, or raise StoreError: no empty part, none that starts with a dot, no `_UNFIT` character.

    So a key can neither leave its store nor meet a half-written file, whose name starts with a dot, and is one line of
    any listing.
    """
    if is_key(key):
        return key
    raise StoreError(
        f"{key!r} can't be a name in a store: parts are separated by single slashes and none may be empty, "
        "start with a dot or hold a backslash, a control character, a line break or bytes that are no UTF-8."
    )


def is_key(key: str) -> bool:
    """Whether `check_key` takes it; what else lies in a folder or a bucket is no object of the store."""
    return not _UNFIT.search(key) and all(part and not part.startswith(".") for part in key.split("/"))


def model_folder(model_id: str) -> str:
    """A local model that cluster nodes fetch from the store."""
    return f"{MODELS}/{model_id}"


def model_file(model_id: str, name: str) -> str:
    """One file of a stored model."""
    return f"{model_folder(model_id)}/{name}"


def model_manifest(model_id: str) -> str:
    """Written last: a model without it is not complete."""
    return model_file(model_id, "manifest.json")


def text_folder(digest: str) -> str:
    """Text files of somebody's machine that cluster nodes read in the store."""
    return f"{TEXTS}/{digest[:16]}"


def corpus_folder(corpus_id: str) -> str:
    """Token shards of one corpus."""
    return f"{CORPORA}/{corpus_id}"


def corpus_file(corpus_id: str, name: str) -> str:
    """One token shard; its name stands in the corpus manifest."""
    return f"{corpus_folder(corpus_id)}/{name}"


def corpus_manifest(corpus_id: str) -> str:
    """Written last: a corpus without it does not exist."""
    return corpus_file(corpus_id, "manifest.json")


def harvest_folder(harvest_id: str) -> str:
    """All hooks of one model, corpus, dtype and window size."""
    return f"{ACTIVATIONS}/{harvest_id}"


def harvest_readers(harvest_id: str) -> str:
    """Folder of the words of jobs that read a harvest."""
    return f"{harvest_folder(harvest_id)}/readers"


def harvest_reader(harvest_id: str, name: str) -> str:
    """The word of one that no unfinished sweep speaks for; it keeps the harvest for a day."""
    return f"{harvest_readers(harvest_id)}/{name}.json"


def hook_folder(harvest_id: str, hook: str) -> str:
    """One hook, or `TOKENS`. A colon is no part of a file name everywhere, so `mlp:in` is written `mlp@in`."""
    return f"{harvest_folder(harvest_id)}/{hook.replace(':', '@')}"


def block_name(index: int, sha256: str) -> str:
    """File name of a block: its content is part of it, so two writers with different bytes never share a file."""
    return f"block-{index:05d}-{sha256[:12]}.safetensors"


def block_file(harvest_id: str, hook: str, name: str) -> str:
    """One block of activations; `name` as in its row, from `block_name`."""
    return f"{hook_folder(harvest_id, hook)}/{name}"


def block_marker(harvest_id: str, hook: str, index: int) -> str:
    """Names the block file that won; a block that no marker names is garbage."""
    return f"{hook_folder(harvest_id, hook)}/block-{index:05d}.json"


def hook_manifest(harvest_id: str, hook: str) -> str:
    """Written last: a hook without it is not harvested."""
    return f"{hook_folder(harvest_id, hook)}/manifest.json"


def sae_folder(sae_id: str) -> str:
    """A SAELens folder with our record."""
    return f"{SAES}/{sae_id}"


def sae_file(sae_id: str, name: str) -> str:
    """A file of an SAE, for example `cfg.json` or `sae_weights.safetensors`."""
    return f"{sae_folder(sae_id)}/{name}"


def training(sae_id: str) -> str:
    """History of the training; written when it is done."""
    return sae_file(sae_id, "training.json")


def evaluation(sae_id: str, evaluation_id: str) -> str:
    """Held-out metrics under one set of evaluation settings."""
    return sae_file(sae_id, f"evaluations/{evaluation_id}.json")


def record(sae_id: str) -> str:
    """Written last: an SAE without it does not exist; with it, it never changes."""
    return sae_file(sae_id, "record.json")


def features_folder(sae_id: str, features_id: str) -> str:
    """What is known of the features of an SAE under one set of settings."""
    return sae_file(sae_id, f"features/{features_id}")


def features_file(sae_id: str, features_id: str, name: str) -> str:
    """`features.parquet`, `contexts.parquet`, or one of `parts/`, which are removed in the end."""
    return f"{features_folder(sae_id, features_id)}/{name}"


def features_manifest(sae_id: str, features_id: str) -> str:
    """Written last: features without it are not complete."""
    return features_file(sae_id, features_id, "manifest.json")


def explanations_folder(sae_id: str, features_id: str) -> str:
    """What language models said of the features of these records."""
    return features_file(sae_id, features_id, "explanations")


def explanations(sae_id: str, features_id: str, name: str, block: int) -> str:
    """What one of them said of a block of features; `name` is made of the model and of what it was asked."""
    return f"{explanations_folder(sae_id, features_id)}/{name}/{block:05d}.json"


def concept_scores(sae_id: str, name: str) -> str:
    """How features of an SAE stand for one concept; `name` is the module's, or one made of the user's texts."""
    return sae_file(sae_id, f"concepts/{name}.json")


def export_folder(sae_id: str, kind: str) -> str:
    """An export of an SAE that was given no place of its own."""
    return sae_file(sae_id, f"exports/{kind}")


def sweep_folder(sweep_id: str) -> str:
    """What belongs to a whole grid."""
    return f"{SWEEPS}/{sweep_id}"


def sweep_file(sweep_id: str, name: str) -> str:
    """A file of a sweep, for example `failures.json`, `report.html` or `frontier.png`."""
    return f"{sweep_folder(sweep_id)}/{name}"


def sweep_record(sweep_id: str) -> str:
    """The resolved configuration and the ids of its SAEs."""
    return sweep_file(sweep_id, "sweep.json")


def retired(sweep_id: str, sae_id: str) -> str:
    """The word that a sweep dropped one of its SAEs because another beats it."""
    return sweep_file(sweep_id, f"retired/{sae_id}.json")


def sweep_runs(sweep_id: str) -> str:
    """When each run of a sweep that made something began, and how long it took."""
    return sweep_file(sweep_id, "runs")


def pack_folder(sweep_id: str, pack: str) -> str:
    """Checkpoints of one pack; removed when its SAEs stand."""
    return sweep_file(sweep_id, f"packs/{pack}")


def pack_checkpoint(sweep_id: str, pack: str, step: int) -> str:
    """The state of a pack after `step` steps."""
    return f"{pack_folder(sweep_id, pack)}/step-{step}.safetensors"


def rates(device: str) -> str:
    """How fast a kind of device was measured to be."""
    return f"{RATES}/{device}.json"
