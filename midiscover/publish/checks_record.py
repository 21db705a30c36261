"""record.json: what the SAE is, what was measured, where it comes from; and the files that it was made from."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

from midiscover.ids import hook_layer, recorded_settings
from midiscover.origin import run_config
from midiscover.publish.checks import (
    CFG,
    RECORD,
    SPARSITY,
    TRAINING,
    WEIGHTS,
    Failed,
    Kind,
    Skipped,
    Subject,
    check,
    expect,
    fail_for,
)
from midiscover.publish.checks_folder import metadata
from midiscover.sae.registry import ARCHITECTURES, FOLDED
from midiscover.saes import RECORD_VERSION

SAE: tuple[Kind, ...] = ("sae",)
RECORDED: tuple[Kind, ...] = ("sae", "bundle")
_RANGES: dict[str, tuple[float, float]] = {
    "tokens": (1, math.inf),
    "l0": (0, math.inf),
    "fvu": (0, math.inf),
    "mse": (0, math.inf),
    "cosine": (-1 - 1e-6, 1 + 1e-6),
    "dead_share": (0, 1),
    "inactive_share": (0, 1),
}
"""Metrics that every record has, and where they can lie."""
_SPLICED: dict[str, tuple[float, float]] = {
    "ce_clean": (0, math.inf),
    "ce_zero": (0, math.inf),
    "ce_sae": (0, math.inf),
    "kl_zero": (-1e-4, math.inf),
    "kl_sae": (-1e-4, math.inf),
    "ce_recovered": (-math.inf, math.inf),
    "kl_recovered": (-math.inf, 1 + 1e-4),
}
"""Those that may be null, where nothing was spliced."""
_LATER = {"ce_recovered_error": (0, math.inf)}
"""Those that older records lack."""
_DIGEST = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def _section(subject: Subject, name: str) -> dict[str, Any]:
    found = subject.json(RECORD).get(name)
    if not isinstance(found, dict):
        raise Skipped(f"record.json has no {name}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@check("record", RECORDED)
def record_is_json(subject: Subject) -> None:
    """record.json is a JSON object of finite numbers."""
    subject.require_json(RECORD)


@check("record", RECORDED)
def record_version_is_known(subject: Subject) -> None:
    """Its version is the one that this miDiscover reads."""
    found = subject.json(RECORD).get("v")
    expect(found == RECORD_VERSION, f"v is {found!r}, not {RECORD_VERSION}")


@check("record", SAE)
def record_id_is_the_folder(subject: Subject) -> None:
    """Its id is the name of the folder."""
    found = subject.json(RECORD).get("id")
    expect(found == subject.name, f"id is {found!r} in the folder {subject.name}")


@check("record", RECORDED)
def record_hook_is_that_of_cfg(subject: Subject) -> str:
    """Its hook and layer are those of cfg.json."""
    record, about = subject.json(RECORD), metadata(subject)
    hook = record.get("hook")
    if not isinstance(hook, str) or not hook:
        raise Failed(f"hook is {hook!r}")
    named = about.get("hf_hook_name") or about.get("hook_name")
    expect(hook == named, f"hook is {hook}, and cfg.json has {named}")
    expect(record.get("layer") == hook_layer(hook), f"layer is {record.get('layer')!r} for {hook}")
    return hook


@check("record", RECORDED)
def record_widths_are_those_of_cfg(subject: Subject) -> str:
    """Its d_in and d_sae are those of cfg.json."""
    record, cfg = subject.json(RECORD), subject.json(CFG)
    fail_for([f"{n} is {record.get(n)}, not {cfg.get(n)}" for n in ("d_in", "d_sae") if record.get(n) != cfg.get(n)])
    return f"{record.get('d_in')} to {record.get('d_sae')}"


@check("record", RECORDED)
def record_settings_are_valid(subject: Subject) -> str:
    """Its kind is saved as the architecture of cfg.json, and its settings are valid."""
    record, architecture = subject.json(RECORD), subject.json(CFG).get("architecture")
    kind, settings = record.get("kind"), record.get("sae")
    expect(kind in ARCHITECTURES, f"kind is {kind!r}; known are {', '.join(ARCHITECTURES)}")
    saved_as = ARCHITECTURES[str(kind)].saelens_architecture
    expect(
        saved_as == architecture or architecture not in FOLDED,
        f"a {kind} is saved as {saved_as}, and cfg.json has {architecture!r}",
    )
    expect(
        isinstance(settings, dict) and settings.get("kind") == kind, "sae, its settings, is missing or of another kind"
    )
    try:
        recorded_settings(record["sae"])
    except (TypeError, ValueError) as error:
        raise Failed(str(error)) from None
    return str(kind)


@check("record", RECORDED)
def metrics_are_there(subject: Subject) -> str:
    """Every metric is there, or null where nothing was spliced."""
    metrics = subject.json(RECORD).get("metrics")
    if not isinstance(metrics, dict):
        raise Failed("metrics is missing")
    lacking = [name for name in _RANGES if not _is_number(metrics.get(name))]
    lacking += [name for name in _SPLICED if name not in metrics]
    fail_for([f"{name} is missing" for name in lacking])
    return f"{sum(map(_is_number, metrics.values()))} numbers"


@check("record", RECORDED)
def metrics_are_in_range(subject: Subject) -> None:
    """Every metric lies where it can lie."""
    metrics, d_sae = _section(subject, "metrics"), subject.json(RECORD).get("d_sae")
    problems = []
    for name, (low, high) in (_RANGES | _SPLICED | _LATER).items():
        value = metrics.get(name)
        if isinstance(value, int | float) and not low <= value <= high:
            problems.append(f"{name} is {value:g}")
    if _is_number(d_sae) and _is_number(metrics.get("l0")) and metrics["l0"] > d_sae:
        problems.append(f"l0 is {metrics['l0']:g} of {d_sae} features")
    fail_for(problems)


@check("record", RECORDED)
def density_counts_every_feature(subject: Subject) -> None:
    """The histogram of firing rates counts every feature once."""
    density, d_sae = _section(subject, "metrics").get("density"), subject.json(RECORD).get("d_sae")
    if not isinstance(density, dict):
        raise Failed("density is missing")
    counts, edges = density["counts"], density["log10_edges"]
    total = sum(counts) + density["never"]
    expect(total == d_sae, f"it counts {total} of {d_sae} features")
    expect(len(edges) == len(counts) + 1, f"{len(counts)} bins have {len(edges)} edges")


@check("record", RECORDED)
def lineage_is_complete(subject: Subject) -> str:
    """Lineage names model, corpus, harvest, code and versions."""
    lineage = subject.json(RECORD).get("lineage")
    if not isinstance(lineage, dict):
        raise Failed("lineage is missing")
    wanted = ("model.name", "model.dtype", "corpus.id", "corpus.source", "harvest", "code.version", "versions.torch")
    lacking = []
    for path in wanted:
        section, _, name = path.partition(".")
        found = lineage.get(section)
        value = found.get(name) if name and isinstance(found, dict) else None if name else found
        if not isinstance(value, str) or not value:
            lacking.append(f"{path} is missing")
    fail_for(lacking)
    return f"{lineage['model']['name']} on {lineage['corpus']['source']}"


@check("record", RECORDED)
def model_has_a_digest(subject: Subject) -> str:
    """The model is known by a commit or a sha256, and a hub model by its commit."""
    model = _section(subject, "lineage").get("model")
    if not isinstance(model, dict):
        raise Skipped("lineage has no model")
    digest, revision = model.get("digest"), model.get("revision")
    expect(isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None, f"digest is {digest!r}")
    expect(revision in (None, digest), f"revision is {revision!r} and digest {digest!r}")
    return str(digest)[:12]


@check("record", RECORDED)
def files_are_those_recorded(subject: Subject) -> None:
    """The sha256 of each file is the one that was recorded."""
    recorded = subject.json(RECORD).get("files")
    if not isinstance(recorded, dict):
        raise Failed("files is missing")
    problems = [f"{name} is not listed" for name in (CFG, WEIGHTS, SPARSITY) if name not in recorded]
    for name, sha256 in recorded.items():
        if subject.has(name) and hashlib.sha256(subject.read(name)).hexdigest() != sha256:
            problems.append(f"{name} is another one")
    fail_for(problems)


@check("record", RECORDED)
def origin_can_be_rebuilt(subject: Subject) -> None:
    """The settings of model and text can be rebuilt, with the hook among them."""
    record = subject.json(RECORD)
    config = run_config(record)
    hooks = {hook for hook in (record.get("hook"), record.get("output_hook")) if hook}
    missing = hooks - set(config.harvest.hooks)
    expect(not missing, f"config.harvest.hooks lacks {', '.join(sorted(missing))}")


@check("training", SAE)
def training_is_json(subject: Subject) -> None:
    """training.json is a JSON object of finite numbers."""
    subject.require_json(TRAINING)


@check("training", SAE)
def training_is_of_these_weights(subject: Subject) -> None:
    """It is of this SAE and of these weights."""
    training = subject.json(TRAINING)
    expect(training.get("id") == subject.name, f"id is {training.get('id')!r}")
    sha256 = hashlib.sha256(subject.read(WEIGHTS)).hexdigest()
    expect(training.get("weights_sha256") == sha256, "weights_sha256 is of other weights")


@check("training", SAE)
def curve_is_whole(subject: Subject) -> str:
    """The curve has columns of equal length, of numbers."""
    history = subject.json(TRAINING).get("history")
    if not isinstance(history, dict) or "step" not in history:
        raise Failed("history, with its column step, is missing")
    lengths = {len(column) for column in history.values()}
    expect(len(lengths) == 1, f"columns have {sorted(lengths)} entries")
    wrong = [name for name, column in history.items() if not all(v is None or _is_number(v) for v in column)]
    fail_for([f"{name} holds what is no number" for name in wrong])
    return f"{lengths.pop()} points"


def _evaluation(subject: Subject) -> str:
    name = subject.json(RECORD).get("evaluation_id")
    if not isinstance(name, str) or not name:
        raise Failed("the record names no evaluation_id")
    return f"evaluations/{name}.json"


@check("training", SAE)
def evaluation_is_there(subject: Subject) -> str:
    """The evaluation that the record names is there."""
    name = _evaluation(subject)
    expect(subject.has(name), f"there is no {name}")
    return name


@check("training", SAE)
def evaluation_is_that_of_the_record(subject: Subject) -> None:
    """Its metrics are those of the record."""
    recorded, name = _section(subject, "metrics"), subject.json(RECORD).get("evaluation_id")
    found = subject.require_json(f"evaluations/{name}.json").get("metrics")
    if not isinstance(found, dict):
        raise Failed("it has no metrics")
    fail_for(
        [f"{key} is {value!r}, not {recorded.get(key)!r}" for key, value in found.items() if recorded.get(key) != value]
    )
