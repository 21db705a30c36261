"""Rebuilds the tracker from the store: every sweep, SAE, curve, scalar, artifact, note and tag.

Adds and corrects, deletes nothing and calls nothing undone, because one database may serve several stores. The store
does not say whether a sweep is still running: one with SAEs missing and no failures is `interrupted`, until its driver
says otherwise; nor when it ran.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from midiscover.errors import CorruptError, TrackingRefusedError
from midiscover.store import layout
from midiscover.tracking.annotations import annotations_key, read_annotations
from midiscover.tracking.rows import FEATURE_COLUMNS
from midiscover.tracking.sweepfiles import retired_reason

if TYPE_CHECKING:
    from midiscover.store.storage import Storage
    from midiscover.tracking.tracker import Kind, SaeStatus, SweepStatus, Tracker

VERSION = 1
"""Of sweep.json, record.json and training.json: the one that this code reads."""

FEATURES_MANIFEST = re.compile(r"features/[^/]+/manifest\.json")
"""Within the folder of an SAE: the last file of its feature records."""
FEATURES = "features.parquet"
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)
"""What a document raises that is absent or not what it should be."""
SWEEP_FILES = ("report.html", "frontier.png")
"""What people look at, and what the tracker lists as artifacts of a sweep."""


class Reindexed(NamedTuple):
    """What was read. `unreadable`: keys that are damaged, of another version or refused, with the reason; skipped."""

    sweeps: int
    saes: int
    curves: int
    evaluations: int
    features: int
    annotations: int
    unreadable: dict[str, str]


def reindex(storage: Storage, tracker: Tracker) -> Reindexed:
    """Read the whole store into the tracker; a second time changes nothing. TrackingError where it does not answer."""
    return _Reindex(storage, tracker).run()


class _Reindex:
    """One pass. What is damaged, or refused by the tracker, is noted in `unreadable` and passed over."""

    def __init__(self, storage: Storage, tracker: Tracker) -> None:
        self.storage = storage
        self.tracker = tracker
        self.counts = dict.fromkeys(("sweeps", "saes", "curves", "evaluations", "features", "annotations"), 0)
        self.unreadable: dict[str, str] = {}

    def run(self) -> Reindexed:
        """Sweeps first: what they planned has to be there before curves and failures are put to it."""
        sweep_files = _by_folder(self.storage.list(layout.SWEEPS))
        sae_files = _by_folder(self.storage.list(layout.SAES))
        sweeps = {name: self._start(name) for name, files in sweep_files.items() if "sweep.json" in files}
        failures = {name: self._failures(name) for name in sweeps if "failures.json" in sweep_files[name]}
        retired = {name: self._retired(name, sweep_files[name]) for name in sweeps}
        done = {name for name, files in sae_files.items() if "record.json" in files and self._record(name, files)}
        planned = {sae for sweep in sweeps.values() for sae in sweep.get("sae_ids", ())}
        trained = {
            name
            for name, files in sae_files.items()
            if "training.json" in files and name in planned | done and self._curve(name)
        }
        for name in sorted(sae_files.keys() & (planned | done)):
            self._annotate("sae", name)
        failed, dropped = _merged(failures.values()), _merged(retired.values())
        for sae in sorted(planned - done):
            status, reason = _state(sae, failed, trained, dropped)
            self.tracker.found_status("sae", sae, status, reason)
        for name, sweep in sweeps.items():
            if sweep:
                self._files(name, sweep_files[name])
                missing = set(sweep["sae_ids"]) - done - retired[name].keys()
                self.tracker.found_status("sweep", name, _sweep_status(missing, failures.get(name, {})))
        return Reindexed(**self.counts, unreadable=self.unreadable)

    def _start(self, name: str) -> dict[str, Any]:
        """The sweep.json, now in the tracker; empty where it can't be read."""
        sweep = self._take(layout.sweep_record(name), self.tracker.found_sweep)
        if sweep:
            self.counts["sweeps"] += 1
            self._annotate("sweep", name)
        return sweep

    def _failures(self, name: str) -> dict[str, str]:
        def check(reasons: dict[str, Any]) -> None:
            if not all(isinstance(reason, str) for reason in reasons.values()):
                raise ValueError("not a reason for each SAE")

        return self._take(layout.sweep_file(name, "failures.json"), check, versioned=False)

    def _retired(self, name: str, files: set[str]) -> dict[str, str]:
        """SAE id -> why the sweep dropped it."""
        reasons: dict[str, str] = {}

        def take(word: dict[str, Any]) -> None:
            reasons[word["id"]] = retired_reason(word)

        for file in sorted(files):
            if file.startswith("retired/"):
                self._take(layout.sweep_file(name, file), take)
        return reasons

    def _record(self, name: str, files: set[str]) -> bool:
        record = self._take(layout.record(name), self.tracker.record_sae)
        if not record:
            return False
        self.counts["saes"] += 1
        for file in sorted(files):
            folder, _, evaluation_id = file.removesuffix(".json").rpartition("/")
            if folder == "evaluations" and evaluation_id != record["evaluation_id"]:
                self._evaluation(name, evaluation_id)
            if FEATURES_MANIFEST.fullmatch(file):
                self._features(name, file)
        return True

    def _features(self, name: str, file: str) -> None:
        def take(manifest: dict[str, Any]) -> None:
            key = layout.features_file(name, manifest["features_id"], FEATURES)
            data = self.storage.read(key)
            if hashlib.sha256(data).hexdigest() != manifest["files"][FEATURES]["sha256"]:
                raise CorruptError(f"{key} differs from its manifest (sha256)")
            try:
                rows = pq.read_table(io.BytesIO(data), columns=list(FEATURE_COLUMNS)).to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise CorruptError(f"{key} can't be read: {error}") from error
            self.tracker.record_features(name, manifest["features_id"], rows)

        if self._take(layout.sae_file(name, file), take):
            self.counts["features"] += 1

    def _evaluation(self, name: str, evaluation_id: str) -> None:
        def take(document: dict[str, Any]) -> None:
            self.tracker.record_metrics(name, evaluation_id, document["metrics"])

        if self._take(layout.evaluation(name, evaluation_id), take):
            self.counts["evaluations"] += 1

    def _curve(self, name: str) -> bool:
        def take(document: dict[str, Any]) -> None:
            self.tracker.record_steps(name, document["history"])

        found = bool(self._take(layout.training(name), take))
        self.counts["curves"] += found
        return found

    def _annotate(self, kind: Kind, name: str) -> None:
        try:
            found = read_annotations(self.storage, kind, name)
            if found is not None:
                self.tracker.set_annotations(kind, name, found)
                self.counts["annotations"] += 1
        except (CorruptError, TrackingRefusedError) as error:
            self.unreadable[annotations_key(kind, name)] = str(error)

    def _files(self, name: str, files: set[str]) -> None:
        for file in sorted(files.intersection(SWEEP_FILES)):
            key = layout.sweep_file(name, file)
            try:
                data = self.storage.read(key)
            except FileNotFoundError:  # a sweep is made anew
                continue
            self.tracker.add_artifact("sweep", name, file, key, sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    def _take(self, key: str, use: Callable[[dict[str, Any]], None], *, versioned: bool = True) -> dict[str, Any]:
        """Read a JSON object and use it. Empty, with the reason in `unreadable`, where it is not what it should be."""
        try:
            document = json.loads(self.storage.read(key))
            if not isinstance(document, dict):
                raise ValueError("not a JSON object")
            if versioned and document.get("v") != VERSION:
                raise ValueError(f"of version {document.get('v')}, this miDiscover reads {VERSION}")
            use(document)
        except (*UNREADABLE, CorruptError, TrackingRefusedError) as error:
            self.unreadable[key] = f"no key {error}" if isinstance(error, KeyError) else str(error)
            return {}
        return document


def _merged(of_sweeps: Iterable[dict[str, str]]) -> dict[str, str]:
    return {sae: reason for of_sweep in of_sweeps for sae, reason in of_sweep.items()}


def _state(
    sae: str, failed: dict[str, str], trained: set[str], dropped: dict[str, str]
) -> tuple[SaeStatus, str | None]:
    """Where an SAE without a record stands, and why. What one sweep dropped, another may have trained."""
    if sae in failed:
        return "failed", failed[sae]
    if sae in trained:
        return "trained", None
    return ("retired", dropped[sae]) if sae in dropped else ("planned", None)


def _sweep_status(missing: set[str], failures: dict[str, str]) -> SweepStatus:
    if not missing:
        return "done"
    return "failed" if missing & failures.keys() else "interrupted"


def _by_folder(keys: Iterable[str]) -> dict[str, set[str]]:
    """`saes/<id>/cfg.json` -> {id: {"cfg.json"}}."""
    folders: dict[str, set[str]] = {}
    for key in keys:
        _, name, file = key.split("/", 2) if key.count("/") > 1 else ("", "", "")
        if name:
            folders.setdefault(name, set()).add(file)
    return folders
