"""Client calls with a deadline: those of asynchronous clients would otherwise wait for ever."""

from __future__ import annotations

from typing import Any

from fsspec.asyn import AsyncFileSystem, sync

CALL_SECS = 150.0
"""The longest that one call may take: longer than the clients' own limits, which name the cause better."""

_SLOWEST_BYTES_PER_SEC = 16 << 10

_MIRRORED = ("s3fs", "gcsfs", "adlfs")
"""Packages whose plain methods do nothing but wait for the asynchronous ones of the same name."""


def call(fs: Any, name: str, *args: Any, moving_bytes: int = 0, **kwargs: Any) -> Any:
    """`fs.name(...)`, given up after a while.

    Args:
        moving_bytes: data that the call transfers, which it is given more time for.
    Raises: what the client raises; fsspec's FSTimeoutError when the time is over.
    """
    if isinstance(fs, AsyncFileSystem) and type(fs).__module__.partition(".")[0] in _MIRRORED:
        limit_secs = CALL_SECS + moving_bytes / _SLOWEST_BYTES_PER_SEC
        return sync(fs.loop, getattr(fs, f"_{name}"), *args, timeout=limit_secs, **kwargs)
    return getattr(fs, name)(*args, **kwargs)
