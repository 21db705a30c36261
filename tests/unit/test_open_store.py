"""Which store an address is, and what is said of addresses that can't be used."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from midiscover.errors import StoreError
from midiscover.store import s3
from midiscover.store.storage import open_store


def test_open_store_looks_at_argument_environment_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MIDISCOVER_STORE", raising=False)
    assert open_store().uri == str(tmp_path / "midiscover-store")
    monkeypatch.setenv("MIDISCOVER_STORE", "from-env")
    assert open_store().uri == str(tmp_path / "from-env")
    assert open_store("given/deep").uri == str(tmp_path / "given" / "deep")
    assert open_store("given").is_local
    assert (tmp_path / "given" / "deep").is_dir()


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        open_store(str(tmp_path / "file"))
    with pytest.raises(StoreError, match="can't be made: Not a directory"):
        open_store(str(tmp_path / "file" / "below"))
    with pytest.raises(StoreError, match="There is no store at"):
        open_store(str(tmp_path / "absent"), create=False)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(StoreError, match="'~nosuchuser/x' lies in the home of a user whom this machine does not know"):
        open_store("~nosuchuser/x")


@pytest.mark.parametrize("address", ["s3://", "s3:///prefix"])
def test_s3_without_bucket(address: str) -> None:
    with pytest.raises(StoreError, match="names no bucket: give s3://bucket"):
        open_store(address)


def test_unknown_scheme() -> None:
    with pytest.raises(StoreError, match="unknown scheme 'gs'"):
        open_store("gs://bucket/prefix")


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No credentials from anywhere, and none asked of a cloud's metadata service."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    return monkeypatch


def test_s3_without_credentials(bare_environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no credentials for the store s3://bucket: set AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket")


@pytest.mark.alone
def test_s3_endpoint_that_refuses_hangs_or_is_no_url(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setenv("AWS_ACCESS_KEY_ID", "key")
    bare_environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert s3._CHECK_SECONDS <= 2
    bare_environment.setattr(s3, "_CHECK_SECONDS", 0.3)
    # The first client of a process reads botocore's description of S3, which takes a second on a slow machine.
    bare_environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3._client(attempts=1, connect_seconds=1, read_seconds=1).close()
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        for endpoint in (_url(closed), _url(silent), "no url"):
            bare_environment.setenv("AWS_ENDPOINT_URL", endpoint)
            began = time.monotonic()
            with pytest.raises(StoreError, match="The store s3://bucket/p does not answer"):
                open_store("s3://bucket/p/")
            assert time.monotonic() - began < 2


def _url(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"
