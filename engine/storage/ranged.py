"""Read an object of a store by ranges, several at a time, into the memory where they are wanted."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from engine.errors import DamagedError
from engine.storage.base import Reader
from engine.storage.client import StoreClient
from engine.storage.source import spans

PART_BYTES = 8 << 20
"""Bytes of one ranged read. Clients that hand out copies have four at once: 32 MiB."""


class RangedReader(Reader):
    """An object of known size; every read is checked to be complete."""

    def __init__(self, client: StoreClient, path: str) -> None:
        self._client = client
        self._path = path
        self._full = client.full(path)
        self._file_bytes = client.size(path)

    @property
    def file_bytes(self) -> int:
        return self._file_bytes

    def read_into(self, offset: int, view: memoryview) -> None:
        flat = memoryview(view).cast("B")
        if offset + len(flat) > self._file_bytes:
            raise self._truncated(offset + len(flat))
        parts = spans(len(flat), PART_BYTES)
        at_once = min(self._client.reads_at_once, len(parts))
        stop = threading.Event()
        if at_once <= 1:
            for begin, end in parts:
                self._read_part(offset + begin, flat[begin:end], stop)
            return
        with ThreadPoolExecutor(at_once, thread_name_prefix="holdfast-download") as pool:
            reads = [
                pool.submit(self._read_part, offset + begin, flat[begin:end], stop) for begin, end in parts
            ]
            done, waiting = wait(reads, return_when=FIRST_EXCEPTION)
            if waiting:
                stop.set()
            for read in waiting:
                read.cancel()
            for read in done:
                read.result()

    def _read_part(self, offset: int, part: memoryview, stop: threading.Event) -> None:
        self._client.do("read", self._path, lambda: self._fill(offset, part), stop=stop)

    def _fill(self, offset: int, part: memoryview) -> None:
        multipart = self._client.multipart
        if multipart is not None and multipart.fetch(self._full, offset, part):
            return
        end = offset + len(part)
        data = self._client.call("cat_file", self._full, start=offset, end=end, moving_bytes=len(part))
        if len(data) != len(part):
            raise self._truncated(end)
        part[:] = data

    def _truncated(self, needed: int) -> DamagedError:
        where = self._client.describe(self._path)
        return DamagedError(f"{where} is truncated: bytes up to {needed} are needed of {self._file_bytes}")
