"""Upload a shard so that an error at any point publishes nothing, and without a second copy of it.

fsspec's `with fs.open(path, "wb")` is not used: an exception inside the block closes the file, and closing
publishes what was written so far.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from engine.errors import NotFoundError
from engine.format.names import TMP_SUFFIX
from engine.storage.base import WINDOW_BYTES
from engine.storage.client import StoreClient
from engine.storage.direct import windows
from engine.storage.multipart import Multipart, part_bytes

MAX_PUT_BYTES = 64 << 20
"""Largest object that is put in one request. Only such a request can carry a precondition: Ceph's gateway
ignores one on the completion of a multipart upload."""

Prepare = Callable[[int, int], None]


def upload(client: StoreClient, path: str, view: memoryview, prepare: Prepare) -> None:
    """Upload all of `view` (contiguous bytes) as a new object.

    `prepare(begin, end)` is called for consecutive ranges before they go out; what it raises passes. After
    an error nothing was published, but for an object whose answer was lost: the caller deletes that.
    """
    if not client.is_object_store:
        _through_file(client, path, view, prepare)
    elif client.multipart is not None and len(view) > WINDOW_BYTES:
        _Upload(client, client.multipart, path, view).run(prepare)
    else:
        _prepare(prepare, 0, len(view))
        full, data = client.full(path), bytes(view)
        client.do("write", path, lambda: client.call("pipe_file", full, data, moving_bytes=len(data)))


class _Upload:
    """One upload in parts, several of them at a time."""

    def __init__(self, client: StoreClient, multipart: Multipart, path: str, view: memoryview) -> None:
        self._client = client
        self._multipart = multipart
        self._path = path
        self._full = client.full(path)
        self._view = view
        self._id = ""
        self._stop = threading.Event()

    def run(self, prepare: Prepare) -> None:
        size = part_bytes(len(self._view))
        ranges = windows(len(self._view), size)
        self._id = self._client.do(
            "write", self._path, lambda: self._multipart.begin(self._full, len(self._view))
        )
        try:
            at_once = min(self._multipart.at_once(size), len(ranges))
            with ThreadPoolExecutor(at_once, thread_name_prefix="holdfast-upload") as pool:
                tokens = self._send(pool, ranges, at_once, prepare)
            self._complete(tokens)
        except BaseException:
            # What this leaves behind in an outage, the next run's retention finds.
            with contextlib.suppress(Exception):
                self._client.briefly("abort", self._path, lambda: self._multipart.abort(self._full, self._id))
            raise

    def _send(
        self, pool: ThreadPoolExecutor, ranges: list[tuple[int, int]], at_once: int, prepare: Prepare
    ) -> list[str]:
        """Put every part as soon as it is prepared; at most `at_once` wait for their turn."""
        sent: list[Future[str]] = []
        under_way: set[Future[str]] = set()
        try:
            for number, (begin, end) in enumerate(ranges, 1):
                if len(under_way) >= at_once:
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                _prepare(prepare, begin, end)
                sent.append(pool.submit(self._put, number, begin, end))
                under_way.add(sent[-1])
            return [future.result() for future in sent]
        except BaseException:
            self._stop.set()
            raise

    def _put(self, number: int, begin: int, end: int) -> str:
        part = self._view[begin:end]
        return self._client.do(
            "write",
            self._path,
            lambda: self._multipart.put_part(self._full, self._id, number, part, self._stop),
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
            if tries == 1 or self._client.size(self._path) != len(self._view):
                raise


def _through_file(client: StoreClient, path: str, view: memoryview, prepare: Prepare) -> None:
    """For real file systems behind a protocol: window after window under a temporary name, then renamed."""
    full = client.full(path)
    temporary = f"{full}.{secrets.token_hex(4)}{TMP_SUFFIX}"
    guard = functools.partial(client.once, "write", path)
    try:
        file = guard(lambda: client.fs.open(temporary, "wb"))
        try:
            for begin, end in windows(len(view)):
                prepare(begin, end)
                guard(functools.partial(file.write, view[begin:end]))
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


def _prepare(prepare: Prepare, begin: int, end: int) -> None:
    for first, last in windows(end - begin):
        prepare(begin + first, begin + last)
