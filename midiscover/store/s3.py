"""A store in an S3 bucket (or a compatible server), through boto3.

Requests are repeated by botocore for about ten seconds, and then here until a server that went away is back, or minutes
have passed; an impatient client gives up after botocore's, some three seconds. A body that breaks off while it is read
is continued with a Range request. `create` needs a server that honours `If-None-Match: *` on PUT, `replace` one that
honours `If-Match` (AWS, SeaweedFS, MinIO, Ceph).
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import boto3.session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)

from midiscover.errors import CorruptError, StoreError, StoreFailedError
from midiscover.store.layout import check_key, is_key
from midiscover.store.storage import Bytes, Entry

T = TypeVar("T")

_ATTEMPTS = 10  # of botocore per request, and of ours per body: rides out an outage of about 10 s
_FEW_ATTEMPTS = 3
_PATIENCE_SECONDS = 300.0
_LONG = 6  # the number of a `_wait` of up to 5 s
_CHECK_SECONDS = 2
_CHUNK = 1 << 20
_MULTIPART_ABOVE = 1 << 30  # one PUT carries 5 GiB at most, and a broken one starts again from zero
_PART = 128 << 20
_ABSENT = {"404", "NoSuchKey", "NotFound"}
_STANDS = {"412", "PreconditionFailed"}
_CONTENDED = {"409", "ConditionalRequestConflict", "OperationAborted"}
_BUSY = {"SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError"}
_BROKEN_BODY = (ResponseStreamingError, IncompleteReadError, ReadTimeoutError)


class _ReplacedError(Exception):
    """Another version of an object stands than the one that was begun."""


class _View(io.RawIOBase):
    """Bytes as a file, without a copy of them."""

    def __init__(self, data: Bytes) -> None:
        self._data, self._place = memoryview(data).cast("B"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: len(self._data)}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        found = self._data[self._place : self._place + len(buffer)]
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


class S3Storage:
    """Objects of one bucket below `prefix` (`""`: all of it). Pickles as its address and connects anew."""

    is_local = False

    def __init__(self, bucket: str, prefix: str = "", patient: bool = True) -> None:
        """Make the client; nothing is asked of the server yet."""
        self.bucket, self.prefix, self.patient = bucket, prefix, patient
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        with self._reached():
            self._client = (
                _client(attempts=_ATTEMPTS, connect_seconds=5, read_seconds=60)
                if patient
                else _client(attempts=_FEW_ATTEMPTS, connect_seconds=2, read_seconds=20)
            )

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str, str, bool]]:
        """The address alone: clients hold sockets and secrets."""
        return S3Storage, (self.bucket, self.prefix, self.patient)

    def check(self) -> None:
        """Ask once whether the bucket is there and lets us in; StoreError within about 2 s where not."""
        client = None
        try:
            with self._reached():
                client = _client(attempts=1, connect_seconds=_CHECK_SECONDS, read_seconds=_CHECK_SECONDS)
                client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            raise StoreError(self._refusal(error)) from error
        finally:
            if client is not None:
                client.close()

    def close(self) -> None:
        """Close idle connections; the storage stays usable."""
        self._client.close()

    def local_path(self, key: str) -> None:
        """See `Storage.local_path`: a bucket has none."""
        check_key(key)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `Storage.read`."""
        return b"" if length == 0 else self._of_one_version(key, lambda: b"".join(self._chunks(key, start, length)))

    def read_into(self, key: str, targets: Sequence[memoryview]) -> None:
        """See `Storage.read_into`."""
        self._of_one_version(key, lambda: self._fill(key, targets))

    def _fill(self, key: str, targets: Sequence[memoryview]) -> None:
        expected, size = sum(len(target) for target in targets), 0
        remaining = iter(targets)
        target = next(remaining, memoryview(b""))
        for chunk in self._chunks(key):
            size += len(chunk)
            source = memoryview(chunk) if size <= expected else memoryview(b"")
            while source:
                while not target:
                    target = next(remaining)
                count = min(len(source), len(target))
                target[:count] = source[:count]
                source, target = source[count:], target[count:]
        if size != expected:
            raise CorruptError(f"{key} in {self.uri} holds {size} bytes where {expected} were written.")

    def write(self, key: str, data: Bytes) -> None:
        """See `Storage.write`."""
        if len(data) <= _MULTIPART_ABOVE:
            self._put(key, data)
            return
        name, parts = self._name(key), TransferConfig(multipart_threshold=_MULTIPART_ABOVE, multipart_chunksize=_PART)
        self._ask(
            "write",
            key,
            lambda: self._client.upload_fileobj(
                _View(data), self.bucket, name, ExtraArgs={"ChecksumAlgorithm": "SHA256"}, Config=parts
            ),
        )

    def create(self, key: str, data: Bytes) -> bool:
        """See `Storage.create`.

        A PUT whose answer was lost is repeated by botocore and then meets its own object: a 412 says only that
        something stands there, so what stands is read and compared. What goes in parts is looked for first, and a
        writer who comes between is not seen.
        """
        if len(data) > _MULTIPART_ABOVE:
            if self.exists(key):
                return self.read(key) == data
            self.write(key, data)
            return True
        for attempt in range(_ATTEMPTS):
            try:
                self._put(key, data, IfNoneMatch="*")
                return True
            except ClientError as error:
                if _code(error) not in _STANDS | _CONTENDED:
                    raise
            try:
                return self.read(key) == data
            except FileNotFoundError:  # the writer we lost against failed or took it back: the place is free again
                _wait(attempt)
        raise StoreError(f"{key} in {self.uri} could not be created: other writers kept getting in the way.")

    def replace(self, key: str, old: Bytes | None, new: Bytes) -> bool:
        """See `Storage.replace`.

        By the ETag under which `old` was read. A PUT whose answer was lost is repeated and then meets its own object:
        after a 412, what stands is read and compared.
        """
        if old is None:
            return self.create(key, new)
        try:
            tag = self.version(key)
            standing = self.read(key)
        except FileNotFoundError:
            return False
        if standing != old:
            return False
        try:
            # What was read is what had the tag, or the tag is an older one's and the PUT is refused.
            self._put(key, new, IfMatch=f'"{tag}"')
            return True
        except FileNotFoundError:  # deleted since
            return False
        except ClientError as error:
            if _code(error) not in _STANDS | _CONTENDED:
                raise
        try:
            return self.read(key) == new
        except FileNotFoundError:
            return False

    def list(self, prefix: str) -> list[str]:
        """See `Storage.list`."""
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> list[Entry]:
        """See `Storage.entries`."""
        below = check_key(prefix.rstrip("/")) + "/" if prefix else ""
        root = f"{self.prefix}/" if self.prefix else ""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root + below)
        items = self._ask("list", prefix, lambda: [item for page in pages for item in page.get("Contents", ())])
        found = [
            Entry(
                item["Key"].removeprefix(root), item["Size"], item["LastModified"].timestamp(), item["ETag"].strip('"')
            )
            for item in items
        ]
        return sorted(entry for entry in found if is_key(entry.key))

    def exists(self, key: str) -> bool:
        """See `Storage.exists`."""
        try:
            self.version(key)
        except FileNotFoundError:
            return False
        return True

    def version(self, key: str) -> str:
        """See `Storage.version`: the ETag."""
        name = self._name(key)
        answer = self._ask("look for", key, lambda: self._client.head_object(Bucket=self.bucket, Key=name))
        return answer["ETag"].strip('"')

    def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        name = self._name(key)
        self._ask("delete", key, lambda: self._client.delete_object(Bucket=self.bucket, Key=name))

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)

    def _put(self, key: str, data: Bytes, **condition: str) -> None:
        request = {"Bucket": self.bucket, "Key": self._name(key), "ChecksumAlgorithm": "SHA256", **condition}

        def body() -> bytes | bytearray | _View:
            return _View(data) if isinstance(data, memoryview) else data

        self._ask(
            "write",
            key,
            lambda: self._client.put_object(Body=body(), **request),
            expected=_STANDS | _CONTENDED if condition else frozenset(),
        )

    def _of_one_version(self, key: str, read: Callable[[], T]) -> T:
        """What `read` makes of the chunks of an object; anew where it was replaced after a body broke off."""
        for attempt in range(_ATTEMPTS):
            try:
                return read()
            except _ReplacedError:
                _wait(attempt)
        raise StoreError(f"{key} in {self.uri} was replaced again and again while it was read.")

    def _chunks(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes of an object from `start` on, whatever breaks on the way; all of one version of it, or
        _ReplacedError."""
        done, size, failures = 0, None, 0
        request: dict[str, Any] = {"Bucket": self.bucket, "Key": self._name(key)}
        while size is None or done < size:
            if start + done or length is not None:
                request["Range"] = f"bytes={start + done}-{'' if length is None else start + length - 1}"
            try:
                expected = {"416", "InvalidRange"} | _STANDS
                answer = self._ask("read", key, lambda: self._client.get_object(**request), expected=expected)
            except ClientError as error:
                if _code(error) in _STANDS:
                    raise _ReplacedError from error
                return  # nothing lies at or behind `start`
            if size is None:
                size, request["IfMatch"] = answer["ContentLength"], answer["ETag"]
            try:
                while chunk := answer["Body"].read(_CHUNK):
                    done += len(chunk)
                    yield chunk
            except _BROKEN_BODY as error:
                failures += 1
                if failures == _ATTEMPTS:
                    raise StoreError(f"{key} in {self.uri} broke off {failures} times while it was read.") from error
                _wait(failures)
            finally:
                answer["Body"].close()

    def _ask(self, verb: str, key: str, request: Callable[[], T], expected: Set[str] = frozenset()) -> T:
        """The answer to a request, repeated while the server is away; botocore's errors as ours.

        Errors with an `expected` code pass as ClientError.
        """
        ends = time.monotonic() + (_PATIENCE_SECONDS if self.patient else 0)
        while True:
            try:
                return request()
            except (ClientError, BotoCoreError, ValueError) as error:
                if not _is_away(error) or time.monotonic() >= ends:
                    self._refused(verb, key, error, expected)
            _wait(_LONG)

    def _refused(self, verb: str, key: str, error: Exception, expected: Set[str]) -> NoReturn:
        if not isinstance(error, ClientError):
            try:
                with self._reached():
                    raise error
            except StoreError as told:
                raise StoreFailedError(str(told)) from error
        if _code(error) in expected:
            raise error
        if _code(error) in _ABSENT:
            raise FileNotFoundError(f"{self.uri}/{key}") from error
        raise StoreFailedError(f"Can't {verb} {key} in the store {self.uri}: {error}.") from error

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreError(
                f"There are no credentials for the store {self.uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE."
            ) from error
        except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
            raise StoreError(
                f"The store {self.uri} does not answer: {str(error).rstrip('.')}. "
                "AWS_ENDPOINT_URL names the server where it is not Amazon's."
            ) from error

    def _refusal(self, error: ClientError) -> str:
        code = _code(error)
        if code in _ABSENT | {"NoSuchBucket"}:
            return f"There is no bucket {self.bucket!r} for the store {self.uri}: make it first, or name another."
        if code in {"403", "AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId"}:
            return f"The store {self.uri} refuses these credentials: check AWS_ACCESS_KEY_ID and the bucket's policy."
        return f"The store {self.uri} can't be used: {error}."


def _client(*, attempts: int, connect_seconds: float, read_seconds: float) -> Any:
    """A thread-safe client from the environment; a session of its own, since the default one is not thread-safe."""
    return boto3.session.Session().client(
        "s3",
        config=Config(
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=connect_seconds,
            read_timeout=read_seconds,
            max_pool_connections=32,
            response_checksum_validation="when_required",  # blocks carry a sha256; a resumed Range has no checksum
        ),
    )


def _is_away(error: Exception) -> bool:
    """Whether the server, or the way to it, may come back: botocore has given up after `_ATTEMPTS`."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or _code(error) in _BUSY
    return isinstance(error, (HTTPClientError, ConnectionError)) and not isinstance(error, SSLError)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _wait(attempt: int) -> None:
    """Full-jitter back-off: at most 0.1 s, 0.2 s, … 5 s."""
    time.sleep(random.uniform(0, min(5.0, 0.1 * 2**attempt)))
