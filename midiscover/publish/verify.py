"""Verification: every check on an SAE or an export, as a report; and what passed as an archive to hand in.

The checks stand in checks_*.py. A report says nothing of time, so that equal folders give equal reports and archives.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import midiscover
from midiscover.errors import StageError, UserError
from midiscover.publish import (  # noqa: F401 - each registers its checks
    checks_bundle,
    checks_dashboards,
    checks_exports,
    checks_features,
    checks_folder,
    checks_measured,
    checks_record,
    checks_saelens,
    checks_weights,
)
from midiscover.publish.checks import (
    CFG,
    GROUPS,
    MANIFEST,
    RECORD,
    REGISTRY,
    TRAINING,
    WEIGHTS,
    Check,
    Kind,
    Outcome,
    Subject,
)
from midiscover.publish.checks_bundle import SEED_FILES
from midiscover.store import layout
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Storage, open_store

CHEAP = ("files", "cfg", "weights", "sparsity", "record", "training")
"""Groups that read the SAE's own files and nothing else."""
_CLOCK = (1980, 1, 1, 0, 0, 0)
_STORED = (".safetensors", ".parquet", ".png", ".gz", ".npy", ".pt")
"""Files that do not shrink."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What all checks of one folder found."""

    name: str
    kind: Kind
    place: str
    """Where it lies."""
    outcomes: tuple[Outcome, ...]

    def count(self, status: str) -> int:
        """Checks that ended so."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def summary(self) -> str:
        """`52 passed, 0 failed, 9 skipped`."""
        return f"{self.count('pass')} passed, {self.count('fail')} failed, {self.count('skipped')} skipped"

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the place, which is another one for every reader."""
        checks = [outcome._asdict() for outcome in self.outcomes]
        counts = {status: self.count(status) for status in ("pass", "fail", "skipped")}
        by = {"midiscover": midiscover.__version__}
        return {"v": 1, "name": self.name, "kind": self.kind, "by": by, "counts": counts, "checks": checks}

    def to_markdown(self) -> str:
        """A table a group."""
        lines = [f"# {self.name}", "", f"{self.summary} (miDiscover {midiscover.__version__})"]
        for group in dict.fromkeys(outcome.group for outcome in self.outcomes):
            lines += ["", f"## {group}", "", "| | check | found |", "|---|---|---|"]
            lines += [
                f"| {outcome.status} | {_cell(outcome.asserts)} | {_cell(outcome.detail)} |"
                for outcome in self.outcomes
                if outcome.group == group
            ]
        return "\n".join(lines) + "\n"


def checks_of(kind: Kind, groups: Collection[str] | None = None) -> list[Check]:
    """The checks of a kind of folder, all or those of some groups."""
    chosen = [check for check in REGISTRY if kind in check.kinds and (groups is None or check.group in groups)]
    return sorted(chosen, key=lambda check: GROUPS.index(check.group))


def verify(subject: Subject, groups: Collection[str] | None = None) -> Report:
    """Run the checks of a folder, all or those of some groups."""
    outcomes = tuple(check.run(subject) for check in checks_of(subject.kind, groups))
    place = f"{subject.files.uri}/{subject.prefix}".rstrip("/")
    return Report(name=subject.name, kind=subject.kind, place=place, outcomes=outcomes)


def subject_of_sae(storage: Storage, sae_id: str) -> Subject:
    """An SAE of a store."""
    return Subject(kind="sae", files=storage, prefix=layout.sae_folder(sae_id), name=sae_id, store=storage)


def subject_of_export(files: Storage, prefix: str, kind: str) -> Subject:
    """An export, where it was written; kind: one of `config.EXPORTS`."""
    return Subject(kind=cast(Kind, kind), files=files, prefix=prefix, name=prefix.rpartition("/")[2])


def subject_of_folder(address: str) -> Subject:
    """A folder, or the s3:// address of one: an SAE, in a store or not, or an export. UserError where it is neither."""
    if address.startswith("s3://"):
        parent, _, name = address.rstrip("/").rpartition("/")
        files, prefix = open_store(parent, create=False), name
        root, _, above = parent.rpartition("/")
    else:
        folder = Path(address).resolve()
        files, prefix, name = LocalStorage(folder, is_store=False), "", folder.name
        root, above = str(folder.parent.parent), folder.parent.name
    subject = Subject(kind="sae", files=files, prefix=prefix, name=name)
    subject.kind = _kind(subject, address)
    if subject.kind == "sae" and above == layout.SAES:
        return subject_of_sae(open_store(root, create=False), name)
    return subject


def _kind(subject: Subject, address: str) -> Kind:
    names = set(subject.names())
    told = subject.json(MANIFEST).get("kind") if MANIFEST in names else None
    if told in ("saelens", "bundle", "neuronpedia"):
        return told
    if names & {RECORD, TRAINING}:
        return "sae"
    if names & {CFG, WEIGHTS}:
        return "saelens"
    if names & set(SEED_FILES):
        return "bundle"
    if any(name.startswith("v1/") for name in names):
        return "neuronpedia"
    raise UserError(
        f"{address} is neither an SAE nor an export: it holds no {CFG}, no {SEED_FILES[0]} and no v1/ of Neuronpedia."
    )


def package(subject: Subject, report: Report, out: Path, more: Iterable[tuple[str, bytes]] = ()) -> Path:
    """Write `<name>.zip` into `out`: the folder's files and the report. StageError where a check failed.

    more: names and contents of further files. Equal contents give an equal archive.
    """
    if report.count("fail"):
        raise StageError(f"{report.name} is not packed: {report.count('fail')} checks failed.")
    files = {name: None for name in subject.names() if "/parts/" not in name}
    given = dict([*report_files(report), *more])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files.keys() | given.keys()):
            data = given[name] if name in given else subject.read(name)
            entry = zipfile.ZipInfo(f"{report.name}/{name}", _CLOCK)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(_STORED) else zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    path = out / f"{report.name}.zip"
    path.write_bytes(buffer.getvalue())
    return path


def report_files(report: Report) -> list[tuple[str, bytes]]:
    """verify.json and verify.md."""
    text = json.dumps(report.to_json(), indent=1) + "\n"
    return [("verify.json", text.encode()), ("verify.md", report.to_markdown().encode())]


def pictures(subject: Subject) -> list[tuple[str, bytes]]:
    """density.png and norms.png of what can be read of an SAE: how often its features fire, and its encoder's norms."""
    import torch

    from midiscover import figures
    from midiscover.publish.checks import SPARSITY, Failed, Skipped
    from midiscover.publish.checks_weights import module, tensors

    made = []
    told = [f"Of {subject.name}"]
    try:
        rates = torch.where(
            tensors(subject, SPARSITY)["sparsity"] > -9.5, 10 ** tensors(subject, SPARSITY)["sparsity"], 0
        )
        rows = [{"value": rate} for rate in rates.tolist()]
        chart = figures.dead_chart(rows, subtitle=[f"{told[0]}, on the held-out tokens of its evaluation"])
        made.append(("density.png", figures.png(chart)))
    except (Failed, Skipped, LookupError):
        pass  # the checks say so
    try:
        rows = [{"value": norm} for norm in module(subject).W_enc.norm(dim=0).tolist()]
        chart = figures.histogram_chart(rows, "Norms of encoder directions", "Norm", subtitle=told)
        made.append(("norms.png", figures.png(chart)))
    except (Failed, Skipped):
        pass
    return made


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
