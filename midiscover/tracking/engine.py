"""The database behind the tracker: its address, its connections, its migrations, and transactions that are tried again.

SQLite for one machine (WAL, so that readers and a writer do not wait for each other), PostgreSQL for more. Everything
that goes wrong leaves here as a TrackingError that says which database, never its password.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    ProgrammingError,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.pool import NullPool

from midiscover.errors import TrackingError, TrackingRefusedError

HEAD = "0004"
"""The newest revision in migrations/versions: known here so that opening a current database loads no Alembic."""

VARIABLE = "MIDISCOVER_DATABASE_URL"
EXAMPLE = f"{VARIABLE}=postgresql+psycopg://user:password@host:5432/midiscover"

ATTEMPTS = 8
PATIENCE_SECONDS = 30.0
LONGEST_PAUSE = 1.0
CONNECT_SECONDS = 2
"""Of each address of a host: a name with an IPv4 and an IPv6 address that both stay silent takes twice as long."""

ADVISORY_LOCK = 0x6D6944
"""Any number does, so long as it is the same one for everybody who migrates."""

T = TypeVar("T")

_alembic_in_this_process = threading.Lock()


def parse_url(address: str) -> URL:
    """Read a database address; `postgres://` and `postgresql://` mean psycopg. TrackingError for any other kind."""
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):  # whose messages would repeat the password
        raise TrackingError(f"The database address can't be read; it should look like {EXAMPLE}.") from None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise TrackingError(
            f"The tracker knows no database of the kind {url.drivername!r}; use sqlite:///path or {EXAMPLE}."
        )
    if url.drivername != "sqlite" and address.count("@") > 1:  # what follows the first would be taken for the host
        raise TrackingError(
            f"The database address has an @ too many; write one in a password as %40, so that it looks like {EXAMPLE}."
        )
    return url


def url_to_read(path: Path) -> URL:
    """Of an SQLite file in a folder that this process may not write to, where readers can't keep their notes."""
    return URL.create("sqlite", database=str(path), query={"mode": "ro", "uri": "true"})


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Without a write-ahead log beside it the file is all there is. Others may write at any time, which SQLite does not
    look for in a file that it is told to be fixed: so it is opened anew for each transaction, see `Database`."""
    log = path.with_name(f"{path.name}-wal")
    fixed = "" if log.exists() and log.stat().st_size else "&immutable=1"
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro{fixed}", uri=True, timeout=PATIENCE_SECONDS)


def is_unwritable(error: TrackingError) -> bool:
    """Whether SQLite could not make a file beside the database, or not write to it."""
    cause = error.__cause__
    code = getattr(cause.orig, "sqlite_errorcode", 0) if isinstance(cause, DBAPIError) else 0
    return code & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


class Database:
    """An engine, and the only two ways to use it: `write` and `read`, each one short transaction."""

    def __init__(self, url: URL) -> None:
        self._url = url
        self._answers = False
        how: dict[str, Any] = {"pool_pre_ping": True, "connect_args": _connect_args(url)}
        only_reads = url.get_backend_name() == "sqlite" and url.query.get("mode") == "ro"
        if only_reads and not (url.database or "").startswith("file:"):  # else somebody knows what SQLite is to be told
            how = {"poolclass": NullPool, "creator": partial(_connect_to_read, Path(url.database or ""))}
        try:
            self._engine = create_engine(url, hide_parameters=True, **how)
        except (ArgumentError, ImportError, TypeError) as error:
            raise TrackingError(f"{self.description} can't be used: {self._first_line(error)}.") from None
        if url.get_backend_name() == "sqlite":
            _prepare_sqlite(self._engine, writes=not only_reads)

    @property
    def description(self) -> str:
        """What a person needs to recognise the database; never user or password."""
        if self._url.get_backend_name() == "sqlite":
            return f"The tracking database {self._url.database or '(in memory)'}"
        place = f"{self._url.host or 'local socket'}:{self._url.port or 5432}/{self._url.database or ''}"
        return f"The tracking database at {place}"

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction that may write, again if the database lost it; so `work` must be idempotent."""
        return self._try(work, writes=True)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction that only reads."""
        return self._try(work, writes=False)

    def close(self) -> None:
        """Close every connection. On SQLite the write-ahead log goes back into the file."""
        self._engine.dispose()

    def _try(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        engine = self._engine.execution_options(writes=writes)
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with engine.begin() as connection:
                    result = work(connection)
            except (SQLAlchemyError, UnicodeError, OverflowError) as error:
                self._consider(error, last=attempt == ATTEMPTS or time.monotonic() - started > PATIENCE_SECONDS)
            else:
                self._answers = True
                return result
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2**attempt)))
        raise AssertionError("the last attempt either returns or raises")

    def _consider(self, error: Exception, *, last: bool) -> None:
        """Return where trying again may help, else raise a TrackingError.

        Once a database has stopped answering, each later call tries it only once, so that an outage costs a training
        run seconds and not seconds per call; the same holds for the first connection of all.
        """
        lost, busy = _is_lost(error), _is_busy(error)
        if (busy and not last) or (lost and self._answers and not last):
            return
        if lost:
            self._answers = False
            raise TrackingError(f"{self.description} does not answer: {self._first_line(error)}.") from error
        kind = TrackingRefusedError if _is_of_the_entry(error) else TrackingError
        raise kind(f"{self.description} refused: {self._first_line(error)}.") from error

    def _first_line(self, error: Exception) -> str:
        cause = error.orig if isinstance(error, DBAPIError) else error
        line = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        passwords = (self._url.password, self._url.query.get("password"))
        for password in passwords:
            if password:
                line = line.replace(str(password), "***")
        return line.rstrip(".")


def migrate(database: Database) -> None:
    """Bring the tables to HEAD. Two processes that do so at once are fine: one waits, then finds nothing to do."""
    if database.read(_revision) == HEAD:
        return
    with _alembic_in_this_process:  # Alembic's context is a global of the process
        database.write(lambda connection: _upgrade(connection, database.description))


def alembic_config(connection: Connection) -> Any:
    """Alembic's Config for our migrations, bound to an open transaction."""
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "midiscover.tracking:migrations")
    return config


def _upgrade(connection: Connection, description: str) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory

    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
    found = _revision(connection)
    if found == HEAD:
        return
    config = alembic_config(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise TrackingError(
            f"{description} was written by a newer miDiscover (revision {found}, this one knows {HEAD}); "
            "install that version, or use another database."
        )
    command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _connect_args(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"timeout": PATIENCE_SECONDS}
    given = url.query
    limits = "-c statement_timeout=60s -c lock_timeout=10s -c idle_in_transaction_session_timeout=60s"
    defaults = {
        "connect_timeout": CONNECT_SECONDS,
        "application_name": "midiscover",
        # A host that vanished without a word is noticed after 10 s and not after TCP's quarter of an hour.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }
    chosen = {name: value for name, value in defaults.items() if name not in given}
    return chosen | {"options": f"{limits} {given.get('options', '')}".strip()}


def _prepare_sqlite(engine: Any, *, writes: bool) -> None:
    """Settings of each connection, and a BEGIN of our own.

    Python's sqlite3 begins transactions late and never for DDL; without that, migrations would not roll back. A
    transaction that will write takes its lock at once: one that begins as a reader may fail to become a writer.
    """

    @event.listens_for(engine, "connect")
    def _on_connect(raw: Any, _record: Any) -> None:
        raw.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON") if writes else ():
            raw.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _is_busy(error: Exception) -> bool:
    """Another transaction was in the way: SQLITE_BUSY, a serialization failure, a deadlock, a lock that timed out."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF == 5 or _sqlstate(cause) in ("40001", "40P01", "55P03")


def _is_of_the_entry(error: Exception) -> bool:
    """What was told does not fit: text without an encoding, a number too large, a key that is too long, no such row."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, (StatementError, UnicodeError, OverflowError))
    state = _sqlstate(error.orig)
    unbound = isinstance(error, ProgrammingError) and not state  # the driver itself did not take it
    return isinstance(error, (DataError, IntegrityError)) or unbound or state.startswith(("22", "23", "54", "42804"))


def _is_lost(error: Exception) -> bool:
    """The connection could not be made, or is gone. libpq gives no SQLSTATE for those that it notices by itself."""
    if not isinstance(error, DBAPIError) or type(error).__name__ != "OperationalError":
        return False
    if error.connection_invalidated:
        return True
    state = _sqlstate(error.orig)
    return hasattr(error.orig, "sqlstate") and (state == "" or state.startswith(("08", "57P")))


def _sqlstate(cause: object) -> str:
    return getattr(cause, "sqlstate", None) or ""
