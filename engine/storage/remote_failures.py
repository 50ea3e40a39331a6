"""Convert the errors of fsspec's file systems and their clients to Holdfast's.

They are recognised by error codes, HTTP statuses and class names, not by the clients' classes: importing
botocore, azure and google clients to name their exceptions would make them dependencies.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
from engine.storage.os_failures import DENIED, FULL, TRANSIENT


class NoBucketError(NotFoundError):
    """The bucket or container itself does not exist."""


class InvalidRangeError(StorageError):
    """The requested range begins at or after the end of the object."""


class UntrustedError(StorageError):
    """The store showed a certificate that was not accepted."""


_BY_CODE: dict[str, type[StorageError]] = {
    "QuotaExceeded": StorageFullError,
    "InsufficientStorage": StorageFullError,
    "AccessDenied": StorageDeniedError,
    "InvalidAccessKeyId": StorageDeniedError,
    "SignatureDoesNotMatch": StorageDeniedError,
    "ExpiredToken": StorageDeniedError,
    "InvalidToken": StorageDeniedError,
    "UserSuspended": StorageDeniedError,
    "AccountProblem": StorageDeniedError,
    "RequestTimeTooSkewed": StorageDeniedError,
    "NoSuchBucket": NoBucketError,
    "ContainerNotFound": NoBucketError,
    "NoSuchKey": NotFoundError,
    "PreconditionFailed": AlreadyExistsError,
    "InvalidRange": InvalidRangeError,
    "SlowDown": StorageUnavailableError,
    "ServiceUnavailable": StorageUnavailableError,
    "InternalError": StorageUnavailableError,
    "RequestTimeout": StorageUnavailableError,
    "OperationAborted": StorageUnavailableError,
    "ConditionalRequestConflict": StorageUnavailableError,
    "IncompleteBody": StorageUnavailableError,
}

_BY_STATUS: dict[int, type[StorageError]] = {
    401: StorageDeniedError,
    403: StorageDeniedError,
    404: NotFoundError,
    407: StorageDeniedError,
    408: StorageUnavailableError,
    412: AlreadyExistsError,
    416: InvalidRangeError,
    425: StorageUnavailableError,
    429: StorageUnavailableError,
    500: StorageUnavailableError,
    502: StorageUnavailableError,
    503: StorageUnavailableError,
    504: StorageUnavailableError,
    507: StorageFullError,
}

_BY_CLASS: dict[str, type[HoldfastError]] = {
    "NoCredentialsError": StorageDeniedError,
    "PartialCredentialsError": StorageDeniedError,
    "CredentialRetrievalError": StorageDeniedError,
    "TokenRetrievalError": StorageDeniedError,
    "UnauthorizedSSOTokenError": StorageDeniedError,
    "ClientAuthenticationError": StorageDeniedError,
    "DefaultCredentialsError": StorageDeniedError,
    "RefreshError": StorageDeniedError,
    "ProfileNotFound": ConfigError,
    "NoRegionError": ConfigError,
    "ParamValidationError": ConfigError,
    "InvalidEndpointConfigurationError": ConfigError,
    # botocore: EndpointConnectionError, ConnectTimeoutError, ReadTimeoutError, ConnectionClosedError, ...
    "HTTPClientError": StorageUnavailableError,
    "ConnectionError": StorageUnavailableError,
    "IncompleteReadError": StorageUnavailableError,
    "ResponseParserError": StorageUnavailableError,
    "IncompleteRead": StorageUnavailableError,
    "FSTimeoutError": StorageUnavailableError,
    # aiohttp: payload cut short, connection refused or lost
    "ClientPayloadError": StorageUnavailableError,
    "ClientConnectionError": StorageUnavailableError,
    "ServiceRequestError": StorageUnavailableError,
    "ServiceResponseError": StorageUnavailableError,
}

_BUILTINS: tuple[tuple[type[BaseException], type[HoldfastError]], ...] = (
    (FileNotFoundError, NotFoundError),
    (FileExistsError, AlreadyExistsError),
    (PermissionError, StorageDeniedError),
    (TimeoutError, StorageUnavailableError),
    (ConnectionError, StorageUnavailableError),
    (TypeError, ConfigError),
    (ValueError, ConfigError),
    (KeyError, ConfigError),
    (ImportError, ConfigError),
)

_ADVICE: dict[type[HoldfastError], str] = {
    StorageFullError: "the quota is used up: free space there, keep fewer checkpoints, or ask for more",
    StorageDeniedError: "access was denied: check the credentials, and that they may read, write and list",
    NoBucketError: "the bucket does not exist: create it, or check its name",
    NotFoundError: "there is no such object: check the path",
    AlreadyExistsError: "the name is taken already: choose another one",
    InvalidRangeError: "it ends before the range that is needed: it is truncated",
    UntrustedError: (
        "its certificate is not trusted: name the bundle of the authority that signed it, for S3 by "
        "AWS_CA_BUNDLE or the storage option client_kwargs.verify"
    ),
    StorageUnavailableError: "the store could not be reached or answered with an error: try again later",
    ConfigError: "the client does not accept its address or options: check them",
    StorageError: "the store refused: check its address and options",
}


@dataclass(frozen=True, slots=True)
class _Signal:
    """The evidence in one exception of a chain."""

    code: str
    status: int | None
    error: BaseException


def remote_error(
    error: BaseException, doing: str, where: str, scrub: Callable[[str], str]
) -> StorageError | ConfigError:
    """The error for a client's exception; `scrub` removes secrets from the client's own text."""
    kind = classify(error)
    said = scrub(f"{type(error).__name__}: {error}")[:300].rstrip(". ")
    text = f"could not {doing} {where}: {_ADVICE[kind]} ({said})"
    if issubclass(kind, ConfigError):
        return ConfigError(text)
    assert issubclass(kind, StorageError)
    mapped = kind(text)
    mapped.errno = error.errno if isinstance(error, OSError) else None
    return mapped


def classify(error: BaseException) -> type[HoldfastError]:
    """Which error of Holdfast's it is. The most specific evidence wins: code, status, class, errno."""
    signals = list(_signals(error))
    if any(isinstance(signal.error, ssl.SSLCertVerificationError) for signal in signals):
        return UntrustedError  # which the clients wrap in what they raise for a connection that broke
    for signal in signals:
        if signal.code in _BY_CODE:
            return _BY_CODE[signal.code]
    for signal in signals:
        if signal.status in _BY_STATUS:
            return _BY_STATUS[signal.status]
    for signal in signals:
        for base in type(signal.error).__mro__:
            if base.__name__ in _BY_CLASS and base.__module__ != "builtins":
                return _BY_CLASS[base.__name__]
    builtin = next((kind for base, kind in _BUILTINS if isinstance(error, base)), StorageError)
    return _by_errno(error) or builtin


def _by_errno(error: BaseException) -> type[StorageError] | None:
    code = error.errno if isinstance(error, OSError) else None
    if code in FULL:
        return StorageFullError
    if code in DENIED:
        return StorageDeniedError
    if code in TRANSIENT or code == errno.EREMOTEIO:
        return StorageUnavailableError
    return None


def _signals(error: BaseException) -> Iterator[_Signal]:
    """The error and what it was raised from, at most eight deep."""
    current: BaseException | None = error
    for _ in range(8):
        if current is None:
            return
        yield _Signal(_code(current), _status(current), current)
        hidden = current.__suppress_context__
        current = current.__cause__ or (None if hidden else current.__context__)


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)  # botocore.exceptions.ClientError
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "error_code", "") or "")  # azure.core.exceptions.HttpResponseError


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        # aiohttp, azure, gcsfs
        found = next(
            (
                value
                for name in ("status", "status_code", "code")
                if isinstance(value := getattr(error, name, None), int)
            ),
            None,
        )
    return found if isinstance(found, int) else None
