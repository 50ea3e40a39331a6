"""Client calls with a deadline: asynchronous clients could otherwise wait forever."""

from __future__ import annotations

from typing import Any

from fsspec.asyn import AsyncFileSystem, sync

CALL_SECS = 150.0
"""The longest that one call may take: longer than the clients' own limits, which name the cause better."""

_SLOWEST_BYTES_PER_SEC = 16 << 10

_MIRRORED = ("s3fs", "gcsfs", "adlfs")
"""Packages whose plain methods only wait for the asynchronous ones of the same name."""


def call(fs: Any, name: str, *args: Any, moving_bytes: int = 0, **kwargs: Any) -> Any:
    """`fs.name(...)`, abandoned after the deadline.

    Args:
        moving_bytes: bytes that the call transfers; they extend the deadline.
    Raises: the client's errors; fsspec's FSTimeoutError after the deadline.
    """
    if isinstance(fs, AsyncFileSystem) and type(fs).__module__.partition(".")[0] in _MIRRORED:
        limit_secs = CALL_SECS + moving_bytes / _SLOWEST_BYTES_PER_SEC
        return sync(fs.loop, getattr(fs, f"_{name}"), *args, timeout=limit_secs, **kwargs)
    return getattr(fs, name)(*args, **kwargs)
