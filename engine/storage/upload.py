"""Upload a shard so that an error at any point publishes nothing.

fsspec's `with fs.open(path, "wb")` is not used: an exception inside the block closes the file, and closing
publishes what was written so far.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from engine.storage.base import WINDOW_BYTES
from engine.storage.client import StoreClient
from engine.storage.direct import windows

MAX_PUT_BYTES = 64 << 20
"""Largest object that is put in one request. Only such a request can carry a precondition: Ceph's gateway
ignores one on the completion of a multipart upload."""

MAX_PARTS = 9_000
"""Parts of a multipart upload; S3 allows 10,000."""

_WITH_DISCARD = frozenset({"s3", "s3a", "gs", "gcs"})
"""Schemes whose files, opened with autocommit=False, appear at commit() and vanish at discard()."""


def part_bytes(file_bytes: int) -> int:
    """Size of the parts of an upload: a window, or as many windows as keep the parts below the limit."""
    per_part = -(-file_bytes // MAX_PARTS)
    return max(1, -(-per_part // WINDOW_BYTES)) * WINDOW_BYTES


def upload(client: StoreClient, path: str, view: memoryview, prepare: Callable[[int, int], None]) -> None:
    """Upload all of `view` (contiguous bytes) as a new object.

    `prepare(begin, end)` is called for consecutive ranges before they go out; what it raises passes. After
    an error nothing was published, but for an object whose answer was lost: the caller deletes that.
    """
    if client.scheme in _WITH_DISCARD and len(view) > WINDOW_BYTES:
        _upload_in_parts(client, path, view, prepare)
        return
    for begin, end in windows(len(view)):
        prepare(begin, end)
    full, data = client.full(path), bytes(view)
    client.do("write", path, lambda: client.fs.pipe_file(full, data))


def _upload_in_parts(
    client: StoreClient, path: str, view: memoryview, prepare: Callable[[int, int], None]
) -> None:
    full, block_bytes = client.full(path), part_bytes(len(view))
    guard = functools.partial(client.once, "write", path)
    file = guard(lambda: client.fs.open(full, "wb", block_size=block_bytes, autocommit=False))
    try:
        for begin, end in windows(len(view)):
            prepare(begin, end)
            guard(functools.partial(file.write, view[begin:end]))
        guard(file.close)  # sends the last part; with autocommit=False it publishes nothing
        guard(file.commit)
    except BaseException:
        with contextlib.suppress(Exception):
            file.discard()
        file.closed = True  # else its finaliser would try to send what is left
        raise
