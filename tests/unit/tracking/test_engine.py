"""Opening a database: addresses, migrations, two at once, versions, and messages that keep the password."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

from midiscover.errors import TrackingError
from midiscover.store.storage import Storage, open_store
from midiscover.tracking.engine import HEAD, VARIABLE, Database, alembic_config, migrate, parse_url, url_to_read
from midiscover.tracking.tables import metadata
from midiscover.tracking.tracker import Tracker
from tests.unit.tracking import samples

TABLES = {*metadata.tables, "alembic_version"}


@pytest.fixture
def database(address: str):
    """A database without tables."""
    found = Database(parse_url(address))
    yield found
    found.close()


def tables_of(address: str) -> set[str]:
    engine = create_engine(parse_url(address))
    found = set(inspect(engine).get_table_names())
    engine.dispose()
    return found


def test_migrations_build_exactly_the_tables_of_the_code(database: Database) -> None:
    migrate(database)

    def differences(connection) -> list:
        options = {"compare_type": True, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    assert database.read(differences) == []


def test_head_is_the_newest_revision(database: Database) -> None:
    assert database.read(lambda c: ScriptDirectory.from_config(alembic_config(c)).get_current_head()) == HEAD


def test_down_and_up_again(database: Database, address: str) -> None:
    migrate(database)
    database.write(lambda connection: command.downgrade(alembic_config(connection), "base"))
    assert tables_of(address) == {"alembic_version"}
    migrate(database)
    assert tables_of(address) == TABLES


def test_a_database_of_the_first_release_keeps_its_rows_and_gains_columns(database: Database, address: str) -> None:
    def build(connection) -> None:
        command.upgrade(alembic_config(connection), "0001")
        rows = [
            {"id": "a", "hook": "layers.1.mlp", "kind": "standard", "l1": 2.5, "k": None, "status": "done"},
            {"id": "b", "hook": "layers.3.mlp", "kind": "topk", "l1": None, "k": 32, "status": "trained"},
            {"id": "c", "hook": None, "kind": None, "l1": None, "k": None, "status": "planned"},
        ]
        names = ", ".join(rows[0])
        places = ", ".join(f":{name}" for name in rows[0])
        connection.execute(text(f"INSERT INTO saes ({names}) VALUES ({places})"), rows)
        connection.execute(text("INSERT INTO sae_metrics VALUES ('a', 'e', 'l0', 7.5)"))

    database.write(build)
    Tracker.open(address).close()
    assert database.read(lambda c: c.execute(text("SELECT version_num FROM alembic_version")).scalar()) == HEAD
    names = ("id", "status", "l1", "k", "output_hook", "control", "sparsity", "target_l0")
    assert [tuple(row[name] for name in names) for row in samples.dump(address)["saes"]] == [
        ("a", "done", 2.5, None, "layers.1.mlp", "none", "l1 2.5", None),
        ("b", "trained", None, 32, "layers.3.mlp", "none", "k 32", None),
        ("c", "planned", None, None, None, None, None, None),
    ]
    database.write(lambda connection: command.downgrade(alembic_config(connection), "0001"))
    assert database.read(lambda c: c.execute(text("SELECT id, k FROM saes ORDER BY id")).all()) == [
        ("a", None),
        ("b", 32),
        ("c", None),
    ]
    assert database.read(lambda c: c.execute(text("SELECT value FROM sae_metrics")).all()) == [(7.5,)]


def test_a_migration_that_breaks_off_leaves_nothing(
    database: Database, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command.upgrade

    def broken(*arguments: Any) -> None:
        whole(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", broken)
        with pytest.raises(KeyboardInterrupt):
            migrate(database)
    assert tables_of(address) == set()
    migrate(database)
    assert tables_of(address) == TABLES


def test_processes_that_open_an_empty_database_at_once(address: str) -> None:
    code = (
        "import sys, alembic.command, psycopg\n"
        "from midiscover.tracking.tracker import Tracker\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "Tracker.open(sys.argv[1]).close()"
    )
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, "-c", code, address], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert tables_of(address) == TABLES


def test_threads_that_open_an_empty_database_at_once(address: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: Tracker.open(address).close(), range(16)))
    assert tables_of(address) == TABLES


def test_a_database_of_a_newer_version_is_left_alone(database: Database, address: str) -> None:
    migrate(database)
    database.write(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    with pytest.raises(TrackingError, match=f"newer miDiscover.*9999.*{HEAD}"):
        Tracker.open(address)


def test_opening_a_current_database_needs_no_alembic_and_nothing_needs_torch(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'tracker.db'}"
    Tracker.open(address).close()
    code = (
        "import sys, midiscover.tracking.reindex\n"
        "from midiscover.tracking.tracker import Tracker\n"
        f"Tracker.open({address!r}).close()\n"
        "print(sorted({'torch', 'ray', 'alembic', 'psycopg', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_local_store_has_its_own_sqlite(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with Tracker.for_store(storage) as tracker:
        tracker.start_sweep(samples.sweep())
    with sqlite3.connect(Path(storage.uri) / "tracker.db") as raw:
        assert raw.execute("SELECT name FROM sweeps").fetchall() == [("demo",)]
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()


def test_the_variable_goes_before_the_store(address: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, address)
    with Tracker.for_store(storage) as tracker:
        tracker.start_sweep(samples.sweep())
    assert len(samples.dump(address)["sweeps"]) == 1
    assert storage.list("") == []


def test_a_bucket_without_a_database_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    bucket = cast(Storage, SimpleNamespace(uri="s3://bucket/prefix", local_path=lambda key: None))
    with pytest.raises(TrackingError, match=rf"s3://bucket/prefix .*{VARIABLE}=postgresql\+psycopg://user") as caught:
        Tracker.for_store(bucket)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "given", ["postgres://u:p@h/d", "postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d"], ids=lambda url: url[:12]
)
def test_names_of_postgresql(given: str) -> None:
    assert parse_url(given).render_as_string(hide_password=False) == "postgresql+psycopg://u:p@h/d"


@pytest.mark.parametrize(
    "given",
    [
        "mysql://user:sesame@host/db",
        "postgresql+asyncpg://user:sesame@host/db",
        "postgresql://user:sesame:1:2@host:port/db",
        "user:sesame@host",
        "postgresql://user:sesame@127.0.0.1:1/db",
        "postgresql://user@127.0.0.1:1/db?password=sesame",
        "postgresql://user:sesame@no-such-host.invalid/db",
        "postgresql://user:sesame@127.0.0.1:1/db?nonsense=sesame",
        "postgresql://user:open@sesame@127.0.0.1:1/db",
        "postgresql://user:open@sesame/@127.0.0.1:1/db",
        "postgresql://user:open@sesame?@127.0.0.1:1/db",
        "sqlite:////no/such/folder/tracker.db",
    ],
)
@pytest.mark.alone
def test_a_bad_address_is_one_sentence_without_the_password(given: str) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        Tracker.open(given)
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert "sesame" not in message
    assert "\n" not in message
    assert message.endswith(".")
    assert ("write one in a password as %40" in message) == (given.count("@") > 1)


@pytest.mark.alone
def test_a_server_that_accepts_and_stays_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(TrackingError, match="does not answer"):
            Tracker.open(f"postgresql://user:sesame@127.0.0.1:{silent.getsockname()[1]}/db")
        assert time.monotonic() - started < 5


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "tracker.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(TrackingError, match=r"tracker\.db refused: file is not a database"):
        Tracker.open(f"sqlite:///{path}")


@pytest.fixture
def as_anybody() -> Iterator[Path]:
    """A folder that anybody may enter, and a process that is anybody: root may write everywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o755)
        yield folder
        if user == 0:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("log", [False, True])
def test_a_store_that_one_may_only_read_is_read(as_anybody: Path, monkeypatch: pytest.MonkeyPatch, log: bool) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    storage = open_store(str(as_anybody))
    with Tracker.for_store(storage) as tracker:
        tracker.start_sweep(samples.sweep())
        if log:  # as beside a driver that runs now: what it wrote stands in the log alone
            for path in as_anybody.iterdir():
                path.with_name(f"copy of {path.name}").write_bytes(path.read_bytes())
    for path in as_anybody.glob("copy of *"):
        path.rename(path.with_name(path.name.removeprefix("copy of ")))
    assert (as_anybody / "tracker.db-wal").exists() == log
    as_anybody.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(OSError, match="ermission"):
        (as_anybody / "x").touch()
    with Tracker.for_store(storage) as tracker:
        assert [run["name"] for run in tracker.list_runs()] == ["demo"]
        assert tracker.where == f"The tracking database {as_anybody / 'tracker.db'}"
        with pytest.raises(TrackingError, match="readonly"):
            tracker.finish_sweep(samples.sweep()["id"], "done")


def test_who_may_only_read_sees_what_others_write_meanwhile(as_anybody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server does whose keys are made and revoked by somebody else."""
    monkeypatch.delenv(VARIABLE, raising=False)
    storage = open_store(str(as_anybody))
    with Tracker.for_store(storage) as tracker:
        tracker.create_key("alice", ["read"])
    reader = Tracker._open(url_to_read(as_anybody / "tracker.db"), storage)
    with reader, Tracker.for_store(storage) as writer:
        assert [(key.name, key.revoked_at) for key in reader.list_keys()] == [("alice", None)]
        writer.revoke_key("alice")
        writer.create_key("bob", ["read"])
        assert {key.name: key.revoked_at is None for key in reader.list_keys()} == {"alice": False, "bob": True}
    with Tracker._open(url_to_read(as_anybody / "tracker.db"), storage) as reader:
        with Tracker.for_store(storage) as writer:
            writer.create_key("carol", ["read"])
        assert len(reader.list_keys()) == 3


def test_an_address_may_say_that_a_file_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with Tracker.for_store(open_store(str(tmp_path))) as tracker:
        tracker.start_sweep(samples.sweep())
    for address in (f"sqlite:///file:{tmp_path}/tracker.db", f"sqlite:///{tmp_path}/tracker.db"):
        with Tracker.open(f"{address}?mode=ro&uri=true") as tracker:
            assert [run["name"] for run in tracker.list_runs()] == ["demo"]
            with pytest.raises(TrackingError, match="readonly"):
                tracker.finish_sweep(samples.sweep()["id"], "done")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="becomes another user")
def test_a_log_that_nobody_put_back_is_told(as_anybody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    storage = open_store(str(as_anybody))
    with Tracker.for_store(storage) as tracker:
        tracker.start_sweep(samples.sweep())
        log = (as_anybody / "tracker.db-wal").read_bytes()
    (as_anybody / "tracker.db-wal").write_bytes(log)  # as after a copy of it without the index of the log
    as_anybody.chmod(0o555)
    os.seteuid(65534)
    with pytest.raises(TrackingError, match="has a log beside it that only somebody who may write there"):
        Tracker.for_store(storage)


@pytest.mark.skipif(os.name == "nt", reason="POSIX file names")
def test_odd_folder_names(tmp_path: Path) -> None:
    storage = open_store(str(tmp_path / "100% of it?#&=é"))
    with Tracker.for_store(storage) as tracker:
        assert tracker.list_runs() == []
    assert (Path(storage.uri) / "tracker.db").is_file()


def test_a_writer_waits_for_another_process(tmp_path: Path) -> None:
    path = tmp_path / "tracker.db"
    with Tracker.open(f"sqlite:///{path}") as tracker:
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.3, lambda: other.execute("COMMIT"))
        timer.start()
        tracker.start_sweep(samples.sweep())
        timer.join()
        other.close()
        assert len(tracker.list_runs()) == 1
