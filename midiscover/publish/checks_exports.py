"""Exports beside an SAE or by themselves: each manifest, the SAELens folder, Neuronpedia's rows."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
from pathlib import Path
from typing import Any

from midiscover.publish.checks import CFG, MANIFEST, RECORD, WEIGHTS, Skipped, Subject, check, expect, fail_for
from midiscover.publish.checks_folder import LICENCES
from midiscover.publish.neuronpedia_rules import violations


def place(subject: Subject, kind: str) -> str:
    """Of an export within the folder: `exports/<kind>/`, or the folder itself. Skipped where there is none."""
    if subject.kind == kind:
        return ""
    if not subject.names(f"exports/{kind}"):
        raise Skipped(f"there is no export as {kind}")
    return f"exports/{kind}/"


def _manifest(subject: Subject, kind: str) -> dict[str, Any]:
    return subject.json(f"{place(subject, kind)}{MANIFEST}")


def _manifest_problems(subject: Subject, kind: str) -> list[str]:
    """What keeps the files of an export from being those of its manifest."""
    where = place(subject, kind)
    if where and not subject.has(where + MANIFEST):
        return [f"{where} has no {MANIFEST}: it was not finished"]
    files = subject.require_json(where + MANIFEST)["files"]
    problems = [f"there is no {where}{name}" for name in files if not subject.has(where + name)]
    for name, told in files.items():
        if subject.has(where + name) and hashlib.sha256(subject.read(where + name)).hexdigest() != told["sha256"]:
            problems.append(f"{where}{name} is another one")
    known = {where + name for name in (MANIFEST, *LICENCES, *files)}
    listed = subject.names(where.rstrip("/"))
    problems += [f"{name} is not one of its files" for name in listed if name not in known and where]
    return problems


@check("exports", ("sae", "saelens"))
def saelens_export_is_whole(subject: Subject) -> None:
    """The files of the SAELens export are those of its manifest."""
    fail_for(_manifest_problems(subject, "saelens"))


@check("exports", ("sae",))
def saelens_export_is_this_sae(subject: Subject) -> None:
    """The SAELens export has the weights of this SAE, byte by byte, under a cfg.json of its widths."""
    where = place(subject, "saelens")
    expect(subject.read(where + WEIGHTS) == subject.read(WEIGHTS), f"{where}{WEIGHTS} are other weights")
    cfg, exported = subject.json(CFG), subject.json(where + CFG)
    differing = [n for n in ("architecture", "d_in", "d_sae", "k", "dtype") if cfg.get(n) != exported.get(n)]
    fail_for([f"{name} is {exported.get(name)!r}, not {cfg.get(name)!r}" for name in differing])


@check("exports", ("sae", "bundle"))
def bundle_is_whole(subject: Subject) -> None:
    """The files of the bundle are those of its manifest."""
    fail_for(_manifest_problems(subject, "bundle"))


@check("exports", ("sae", "neuronpedia"))
def neuronpedia_export_is_whole(subject: Subject) -> None:
    """The files of the Neuronpedia export are those of its manifest."""
    fail_for(_manifest_problems(subject, "neuronpedia"))


@check("exports", ("sae", "neuronpedia"))
def neuronpedia_rows_follow_the_rules(subject: Subject) -> None:
    """Every row of the Neuronpedia export follows the importer's rules."""
    where = place(subject, "neuronpedia")
    local = subject.files.local_path(subject.key(f"{where}{MANIFEST}"))
    if local is not None:
        fail_for(violations(local.parent))
        return
    with tempfile.TemporaryDirectory(prefix="midiscover-neuronpedia-") as folder:
        for name in subject.names(where.rstrip("/")):
            path = Path(folder, name.removeprefix(where))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(subject.read(name))
        fail_for(violations(Path(folder)))


@check("exports", ("sae",))
def neuronpedia_export_is_this_sae(subject: Subject) -> str:
    """The Neuronpedia export has a row for each feature of this SAE."""
    where = place(subject, "neuronpedia")
    manifest, d_sae = _manifest(subject, "neuronpedia"), subject.json(RECORD).get("d_sae")
    expect(manifest.get("sae") == subject.name, f"{where}{MANIFEST} is of {manifest.get('sae')!r}")
    batches = [name for name in subject.names(where.rstrip("/")) if "/features/batch-" in name]
    rows = sum(gzip.decompress(subject.read(name)).count(b"\n") for name in batches)
    expect(rows == d_sae, f"{rows} rows for {d_sae} features")
    return f"{rows:,} rows"
