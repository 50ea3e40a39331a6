"""Which error each failure becomes, and that its message says where and what to do."""

from __future__ import annotations

import errno
import os

import pytest

from engine.errors import (
    AlreadyExistsError,
    ConfigError,
    HoldfastError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from engine.storage.os_failures import mapped, storage_error
from engine.storage.remote_failures import InvalidRangeError, NoBucketError, classify, remote_error


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (errno.ENOSPC, StorageFullError, "free space"),
        (errno.EDQUOT, StorageFullError, "free space"),
        (errno.EACCES, StorageDeniedError, "choose another directory"),
        (errno.EPERM, StorageDeniedError, "choose another directory"),
        (errno.EROFS, StorageDeniedError, "choose another directory"),
        (errno.ENOENT, NotFoundError, "check the path"),
        (errno.EEXIST, AlreadyExistsError, "choose another"),
        (errno.ENOTEMPTY, AlreadyExistsError, "choose another"),
        (errno.ETIMEDOUT, StorageUnavailableError, "try again"),
        (errno.ECONNRESET, StorageUnavailableError, "try again"),
        (errno.EAGAIN, StorageUnavailableError, "try again"),
        (errno.ESTALE, StorageUnavailableError, "try again"),
        (errno.EMFILE, StorageUnavailableError, "ulimit -n"),
        (errno.EIO, StorageError, "kernel log"),
        (errno.ENOTDIR, StorageError, "check the path"),
        (errno.ENAMETOOLONG, StorageError, "shorter"),
        (errno.EXDEV, StorageError, os.strerror(errno.EXDEV)),
    ],
)
def test_local_errors(code: int, kind: type[StorageError], advice: str) -> None:
    error = storage_error(OSError(code, "raw"), "write", "/somewhere/x")
    assert type(error) is kind
    assert error.errno == code
    text = str(error)
    assert text.startswith("could not write /somewhere/x: ")
    assert advice in text
    assert "\n" not in text


def test_mapping_keeps_the_cause_and_own_errors() -> None:
    cause = OSError(errno.ENOSPC, "raw")
    with pytest.raises(StorageFullError) as raised, mapped("write", "x"):
        raise cause
    assert raised.value.__cause__ is cause
    own = NotFoundError("mine")
    with pytest.raises(NotFoundError) as kept, mapped("write", "x"):
        raise own
    assert kept.value is own


class Response(Exception):
    """Shaped like botocore's ClientError."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class Status(Exception):
    """Shaped like aiohttp's and gcsfs's errors."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def client_class(name: str, module: str = "botocore.exceptions") -> Exception:
    """An instance of a client's exception, known by its name only."""
    return type("Specific", (type(name, (Exception,), {"__module__": module}),), {})("said the client")  # type: ignore[no-any-return]


REMOTE = [
    (Response("QuotaExceeded", 403), StorageFullError),
    (Status(507), StorageFullError),
    (OSError(errno.ENOSPC, "full"), StorageFullError),
    (Response("AccessDenied", 403), StorageDeniedError),
    (Response("InvalidAccessKeyId", 403), StorageDeniedError),
    (Response("SignatureDoesNotMatch", 403), StorageDeniedError),
    (Response("SomethingNew", 403), StorageDeniedError),
    (Status(401), StorageDeniedError),
    (PermissionError("no"), StorageDeniedError),
    (client_class("NoCredentialsError"), StorageDeniedError),
    (Response("NoSuchBucket", 404), NoBucketError),
    (raised_from(FileNotFoundError("x"), Response("NoSuchBucket", 404)), NoBucketError),
    (Response("NoSuchKey", 404), NotFoundError),
    (Status(404), NotFoundError),
    (FileNotFoundError("x"), NotFoundError),
    (Response("PreconditionFailed", 412), AlreadyExistsError),
    (raised_from(OSError(errno.EINVAL, "x"), Response("412", 412)), AlreadyExistsError),
    (FileExistsError("x"), AlreadyExistsError),
    (raised_from(OSError(errno.EINVAL, "x"), Response("InvalidRange", 416)), InvalidRangeError),
    (Response("SlowDown", 503), StorageUnavailableError),
    (Response("InternalError", 500), StorageUnavailableError),
    (Response("ConditionalRequestConflict", 409), StorageUnavailableError),
    (Response("SomethingNew", 502), StorageUnavailableError),
    (Status(429), StorageUnavailableError),
    (Status(504), StorageUnavailableError),
    (OSError(errno.EBUSY, "s3fs says so for 503"), StorageUnavailableError),
    (ConnectionResetError(errno.ECONNRESET, "reset"), StorageUnavailableError),
    (ConnectionError("no number"), StorageUnavailableError),
    (TimeoutError("slow"), StorageUnavailableError),
    (client_class("HTTPClientError"), StorageUnavailableError),
    (client_class("ClientPayloadError", "aiohttp.client_exceptions"), StorageUnavailableError),
    (client_class("FSTimeoutError", "fsspec.exceptions"), StorageUnavailableError),
    (client_class("ParamValidationError"), ConfigError),
    (TypeError("unexpected keyword argument"), ConfigError),
    (Response("SomethingNew", 418), StorageError),
    (RuntimeError("whatever"), StorageError),
]


@pytest.mark.parametrize(("error", "kind"), REMOTE, ids=lambda value: repr(value)[:50])
def test_remote_errors(error: Exception, kind: type[HoldfastError]) -> None:
    assert classify(error) is kind
    mapped_error = remote_error(error, "read", "s3://bucket/x", lambda text: text)
    assert type(mapped_error) is kind
    assert str(mapped_error).startswith("could not read s3://bucket/x: ")
    assert "\n" not in str(mapped_error)


def test_real_client_errors() -> None:
    """The names above are botocore's and aiohttp's as they are."""
    exceptions = pytest.importorskip("botocore.exceptions")
    aiohttp = pytest.importorskip("aiohttp")
    unavailable = [
        exceptions.EndpointConnectionError(endpoint_url="http://x"),
        exceptions.ConnectTimeoutError(endpoint_url="http://x"),
        exceptions.ReadTimeoutError(endpoint_url="http://x"),
        exceptions.ConnectionClosedError(endpoint_url="http://x"),
        exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        aiohttp.ClientPayloadError("cut"),
        aiohttp.ServerDisconnectedError(),
    ]
    for error in unavailable:
        assert classify(error) is StorageUnavailableError, error
    assert classify(exceptions.NoCredentialsError()) is StorageDeniedError
    assert classify(exceptions.ProfileNotFound(profile="x")) is ConfigError
    found = exceptions.ClientError({"Error": {"Code": "NoSuchKey"}}, "GetObject")
    assert classify(found) is NotFoundError


def test_client_text_is_scrubbed_and_bounded() -> None:
    said = RuntimeError("the key hunter2 " * 100)
    error = remote_error(said, "read", "x", lambda text: text.replace("hunter2", "*"))
    assert "hunter2" not in str(error)
    assert len(str(error)) < 500


def test_a_chain_that_loops_ends() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert classify(one) is StorageError
