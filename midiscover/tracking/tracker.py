"""The tracker: opens the database of a store, takes down what a run does, and answers what people ask.

    tracker = Tracker.for_store(open_store("./midiscover-store"))
    tracker.start_sweep(sweep, planned)         # sweep.json, and the grid's rows
    tracker.sae_status(sae_id, "training")
    tracker.record_steps(sae_id, training["history"])
    tracker.record_sae(record)                  # record.json
    tracker.finish_sweep(sweep["id"], "done")
    tracker.compare("demo")                     # rows, with the frontier

Only drivers write. Each write is one short transaction that may be repeated. A database that goes away raises
TrackingError from every write; a run catches it, goes on, and `reindex` fills the gap from the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from sqlalchemy import URL

from midiscover.errors import NotFoundError, TrackingError
from midiscover.store import layout
from midiscover.tracking import keys, queries, writes
from midiscover.tracking.annotations import Annotations, change_annotations, read_annotations
from midiscover.tracking.engine import EXAMPLE, VARIABLE, Database, is_unwritable, migrate, parse_url, url_to_read
from midiscover.tracking.rows import Row, checked_tag, checked_text
from midiscover.tracking.sweepfiles import read_stability

if TYPE_CHECKING:
    from midiscover.store.storage import Storage

SweepStatus = Literal["running", "done", "failed", "interrupted"]
SaeStatus = Literal["planned", "training", "trained", "failed", "retired"]
Kind = Literal["sweep", "sae"]


class Tracker:
    """One database. A context manager; safe to share between threads, not to be sent to another process."""

    def __init__(self, database: Database, storage: Storage | None = None) -> None:
        self._database = database
        self._storage = storage

    @classmethod
    def open(cls, address: str, storage: Storage | None = None) -> Self:
        """Connect to a database address and bring its tables up to date.

        `storage` is where annotations are kept as well. TrackingError, within 5 seconds, for an address of another
        kind than SQLite and PostgreSQL, a database that does not answer, and one that a newer version wrote.
        """
        return cls._open(parse_url(address), storage)

    @classmethod
    def _open(cls, url: URL, storage: Storage | None) -> Self:
        database = Database(url)
        try:
            migrate(database)
        except BaseException:
            database.close()
            raise
        return cls(database, storage)

    @classmethod
    def for_store(cls, storage: Storage) -> Self:
        """The tracker of a store: $MIDISCOVER_DATABASE_URL, else SQLite in the folder of a local store.

        That of a folder which one may only read answers and takes nothing. TrackingError for a store that is no folder
        while the variable is not set: SQLite needs one machine; and for a log that nobody put back into such a file.
        """
        address = os.environ.get(VARIABLE)
        if address:
            return cls.open(address, storage)
        path = storage.local_path(layout.TRACKER)
        if path is None:
            raise TrackingError(f"The store {storage.uri} is no local folder, so it needs a database: set {EXAMPLE}.")
        try:
            return cls._open(URL.create("sqlite", database=str(path)), storage)
        except TrackingError as error:
            if not (is_unwritable(error) and path.is_file()):
                raise
        try:
            return cls._open(url_to_read(path), storage)
        except TrackingError as error:
            if not is_unwritable(error):
                raise
            raise TrackingError(
                f"{path} has a log beside it that only somebody who may write there can put back into it; have "
                "`midiscover runs list` run there once."
            ) from error

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def where(self) -> str:
        """The database for people, without user and password."""
        return self._database.description

    def __repr__(self) -> str:
        return f"<Tracker: {self._database.description}>"

    # Writing

    def start_sweep(self, sweep: Mapping[str, Any], planned: Iterable[Mapping[str, Any]] | None = None) -> None:
        """A sweep starts, for the first time or again.

        `sweep` is its sweep.json; `planned` its SAEs as `rows.PlannedRow` (default: the key `saes` of the sweep.json,
        from which `reindex` knows SAEs that never got a record). SAEs that are trained or done keep their status,
        failed ones are planned again. Note and tags count the first time only; from then on they are `annotate`'s.
        """
        rows = list(sweep.get("saes", ()) if planned is None else planned)
        self._database.write(lambda connection: writes.start_sweep(connection, sweep, rows))

    def found_sweep(self, sweep: Mapping[str, Any]) -> None:
        """A sweep.json stands in a store: for `reindex`, which knows nothing of when it ran."""
        rows = list(sweep.get("saes", ()))
        self._database.write(lambda connection: writes.found_sweep(connection, sweep, rows))

    def found_status(self, kind: Kind, name: str, status: str, reason: str | None = None) -> None:
        """How a sweep, or an SAE without a record, stands in a store: for `reindex`. What is done stays done."""
        self._database.write(lambda connection: writes.found_status(connection, kind, name, status, reason))

    def finish_sweep(self, sweep_id: str, status: SweepStatus) -> None:
        """A sweep ends as `done`, `failed` or `interrupted`. TrackingError for an id that was never started."""
        self._database.write(lambda connection: writes.finish_sweep(connection, sweep_id, status))

    def sae_status(self, sae_id: str, status: SaeStatus, reason: str | None = None) -> None:
        """An SAE moves on; `reason` says why it failed or was retired. `done` comes from `record_sae`."""
        self._database.write(lambda connection: writes.sae_status(connection, sae_id, status, reason))

    def record_steps(self, sae_id: str, history: Mapping[str, Sequence[Any]]) -> None:
        """A training curve, or its next piece: columns of equal length, one of them `step`, as in training.json.

        What the tracker has from the first of these steps on is replaced, so a resumed run may tell it again.
        """
        self._database.write(lambda connection: writes.record_steps(connection, sae_id, history))

    def record_sae(self, record: Mapping[str, Any]) -> None:
        """An SAE is done: its record.json (settings, lineage, scalars, files). It need not have been planned."""
        self._database.write(lambda connection: writes.record_sae(connection, record))

    def record_metrics(self, sae_id: str, evaluation_id: str, metrics: Mapping[str, Any]) -> None:
        """The scalars of one more evaluation of an SAE, besides the one in its record."""
        self._database.write(lambda connection: writes.record_metrics(connection, sae_id, evaluation_id, metrics))

    def record_features(self, sae_id: str, features_id: str, features: Sequence[Row]) -> None:
        """The scalars of all features of an SAE: rows with `rows.FEATURE_COLUMNS`, as features.parquet has them."""
        self._database.write(lambda connection: writes.record_features(connection, sae_id, features_id, features))

    def add_artifact(
        self, kind: Kind, owner_id: str, name: str, uri: str, *, sha256: str | None = None, size: int | None = None
    ) -> None:
        """A file of a sweep or an SAE. `uri`: its key in the store, or a full URI. `size` in bytes."""
        key = {"owner_kind": kind, "owner_id": owner_id, "name": name}
        row = key | {"uri": uri, "sha256": sha256, "bytes": size}
        self._database.write(lambda connection: writes.add_artifact(connection, row))

    def annotate(
        self, text: str, note: str | None = None, *, add_tags: Iterable[str] = (), remove_tags: Iterable[str] = ()
    ) -> Annotations:
        """Set the note (empty: take it away) and change the tags of a sweep or SAE, in the store and then here.

        Takes an id or unique prefix and returns what holds now. NotFoundError for an id that fits nothing or several,
        and for what lies in another store.
        """
        add, remove = [checked_tag(tag) for tag in add_tags], list(remove_tags)
        if note is not None:
            checked_text("The note", note)
        kind, name = self._database.read(lambda connection: queries.resolve(connection, text))
        known = self._database.read(lambda connection: queries.annotations_of(connection, kind, name))
        if self._storage is None:
            after = known.changed(note, add, remove)
            self.set_annotations(kind, name, after)
            return after
        self._require_stored(self._storage, kind, name)
        after = change_annotations(
            self._storage, kind, name, known, lambda standing: standing.changed(note, add, remove)
        )
        while True:
            self.set_annotations(kind, name, after)
            # Somebody whose file came later may have been here earlier: the last one here leaves what stands.
            standing = read_annotations(self._storage, kind, name) or after
            if standing == after:
                return after
            after = standing

    def _require_stored(self, storage: Storage, kind: str, name: str) -> None:
        """NotFoundError where a store holds nothing of a sweep, or neither an SAE nor a sweep that it belongs to."""
        found = [layout.sweep_record(name)]
        if kind == "sae":
            sweeps = self._database.read(lambda connection: queries.sweeps_of(connection, name))
            found = [layout.record(name), *map(layout.sweep_record, sweeps)]
        if not any(map(storage.exists, found)):
            raise NotFoundError(
                f"{name} does not lie in the store {storage.uri}; give the one where it does by --store."
            )

    def set_annotations(self, kind: str, name: str, annotations: Annotations) -> None:
        """Exactly this note and these tags, in the database only."""
        self._database.write(lambda connection: writes.set_annotations(connection, kind, name, *annotations))

    # Keys of deployments

    def create_key(self, name: str, scopes: Iterable[str]) -> str:
        """Make a key; what is returned is shown once and kept nowhere. ConfigError for a name or scope that is none."""
        row, text = keys.new_key(name, list(scopes))
        self._database.write(lambda connection: keys.put_key(connection, row))
        return text

    def list_keys(self) -> list[keys.ApiKey]:
        """All keys, oldest first, with the hashes of their secrets; those that were revoked among them."""
        return self._database.read(keys.list_keys)

    def revoke_key(self, name: str) -> keys.ApiKey:
        """Revoke a key by its name or the beginning of its id. NotFoundError where none or several fit."""
        found = self._database.read(lambda connection: keys.find_key(connection, name))
        revoked = found._replace(revoked_at=datetime.now(UTC))
        self._database.write(lambda connection: keys.revoke_key(connection, revoked))
        return revoked

    # Reading. Ids may be unique prefixes; NotFoundError names the nearest ids.

    def list_runs(self) -> list[Row]:
        """Sweeps, newest first: id, name, status, times, owner, note, tags, and how many SAEs there are.

        `saes` counts all, `done`, `failed` and `retired` those.
        """
        return self._database.read(queries.list_runs)

    def show(self, text: str) -> Row:
        """Everything about one sweep or SAE. `type` tells which; a sweep lists its SAEs with status and reason."""
        return self._database.read(lambda connection: queries.show(connection, text))

    def compare(self, sweep: str) -> list[Row]:
        """One row per SAE of a sweep, in the order of its grid, with the keys of the sweep's own table.

        `sae_id, sparsity_label, seconds`, `variant` (see `ids.variants`) and `queries.SETTINGS`, then all scalars of
        the sweep's own evaluation (those of `queries.MEASURES` always, None where left out), then `frontier` and
        `best_of_kind`: whether no SAE of the same hook, or of the same hook and architecture, beats it in L0 and FVU;
        never a control. SAEs that are not done have no row; `show` lists them.
        """
        return self._database.read(lambda connection: queries.compare(connection, sweep))

    def stability(self, sweep: str) -> list[Row]:
        """Pairs of the sweep's SAEs and the share of features they have in common, as its stability.json has them.

        Empty where the sweep has none, or the tracker no store. CorruptError for a file that can't be read.
        """
        _, name = self._database.read(lambda connection: queries.resolve(connection, sweep, kinds=("sweep",)))
        return [] if self._storage is None else read_stability(self._storage, name)

    def steps(self, sae_id: str) -> dict[str, list[Any]]:
        """An SAE's curve as columns, as `record_steps` takes it, all but `step` as floats; None where not finite."""
        return self._database.read(lambda connection: queries.curve(connection, sae_id))
