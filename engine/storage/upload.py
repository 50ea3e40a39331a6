"""Uploads a shard without a second copy of it; an error at any point publishes nothing.

fsspec's `with fs.open(path, "wb")` is not used: an exception inside the block closes the file, and closing
publishes what was written so far.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading

from engine.errors import NotFoundError
from engine.format.names import TMP_SUFFIX
from engine.storage.base import WINDOW_BYTES
from engine.storage.client import StoreClient
from engine.storage.multipart import Multipart, part_bytes
from engine.storage.parallel_send import send_windows
from engine.storage.source import Source, Window, in_order

MAX_PUT_BYTES = 64 << 20
"""Largest object that is put in one request. Only such a request can carry a precondition: Ceph's gateway
ignores one on the completion of a multipart upload."""


def upload(client: StoreClient, path: str, source: Source) -> None:
    """Upload a source as a new object.

    After an error nothing is published, except an object whose answer was lost: the caller deletes that.
    """
    if not client.is_object_store:
        _through_file(client, path, source)
    elif client.multipart is not None and source.file_bytes > WINDOW_BYTES:
        _Upload(client, client.multipart, path, source).run()
    else:
        _whole(client, path, source)


class _Upload:
    """One upload in parts, several of them at a time. A part is a window of the source."""

    def __init__(self, client: StoreClient, multipart: Multipart, path: str, source: Source) -> None:
        self._client = client
        self._multipart = multipart
        self._path = path
        self._full = client.full(path)
        self._source = source
        self._part_bytes = part_bytes(source.file_bytes)
        self._id = ""
        self._stop = threading.Event()

    def run(self) -> None:
        self._id = self._client.do(
            "write", self._path, lambda: self._multipart.begin(self._full, self._source.file_bytes)
        )
        try:
            at_once = min(
                self._multipart.at_once(self._part_bytes), -(-self._source.file_bytes // self._part_bytes)
            )
            with contextlib.closing(in_order(self._source, self._part_bytes)) as parts:
                tokens = send_windows(
                    parts, self._put, at_once, thread_name="holdfast-upload", stop=self._stop
                )
            self._complete(tokens)
        except BaseException:
            # What this leaves behind in an outage, the next run's retention finds.
            with contextlib.suppress(Exception):
                self._client.briefly("abort", self._path, lambda: self._multipart.abort(self._full, self._id))
            raise

    def _put(self, part: Window) -> str:
        number, view = part.begin // self._part_bytes + 1, part.view
        return self._client.do(
            "write",
            self._path,
            lambda: self._multipart.put_part(self._full, self._id, number, view, self._stop),
            stop=self._stop,
        )

    def _complete(self, tokens: list[str]) -> None:
        tries = 0

        def complete() -> None:
            nonlocal tries
            tries += 1
            self._multipart.complete(self._full, self._id, tokens)

        try:
            self._client.do("write", self._path, complete)
        except NotFoundError:
            # After a failed try the upload may be gone because it is complete: its answer was lost.
            if tries == 1 or self._client.size(self._path) != self._source.file_bytes:
                raise


def _whole(client: StoreClient, path: str, source: Source) -> None:
    """In one request, from one copy in memory, which the client of a store without parts wants anyway."""
    copies = []
    with contextlib.closing(in_order(source, WINDOW_BYTES)) as windows:
        for window in windows:
            copies.append(bytes(window.view))
            window.release()
    full, data = client.full(path), b"".join(copies)  # of one window, that is the copy itself
    client.do("write", path, lambda: client.call("pipe_file", full, data, moving_bytes=len(data)))


def _through_file(client: StoreClient, path: str, source: Source) -> None:
    """For real file systems behind a protocol: window after window under a temporary name, then renamed."""
    full = client.full(path)
    temporary = f"{full}.{secrets.token_hex(4)}{TMP_SUFFIX}"
    guard = functools.partial(client.once, "write", path)
    try:
        file = guard(lambda: client.fs.open(temporary, "wb"))
        try:
            with contextlib.closing(in_order(source, WINDOW_BYTES)) as windows:
                for window in windows:
                    guard(functools.partial(file.write, window.view))
                    window.release()
        except BaseException:
            with contextlib.suppress(Exception):
                file.close()
            raise
        guard(file.close)
        guard(lambda: client.fs.mv(temporary, full))
    except BaseException:
        with contextlib.suppress(Exception):
            client.fs.rm_file(temporary)
        raise
