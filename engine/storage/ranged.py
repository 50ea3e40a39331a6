"""Read an object of a store by ranges, several at a time."""

from __future__ import annotations

from engine.errors import DamagedError
from engine.storage.base import Reader
from engine.storage.client import StoreClient
from engine.storage.direct import windows

PART_BYTES = 8 << 20
"""Bytes of one ranged read."""

PARTS_AT_ONCE = 4
"""Ranged reads in flight for one call: 32 MiB of memory, since fsspec hands out copies."""


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
        parts = windows(len(flat), PART_BYTES)
        for first in range(0, len(parts), PARTS_AT_ONCE):
            self._read_parts(offset, flat, parts[first : first + PARTS_AT_ONCE])

    def _read_parts(self, offset: int, flat: memoryview, parts: list[tuple[int, int]]) -> None:
        """Fill `parts`, ranges [begin, end) of `flat`, from the object's bytes `offset` further on."""
        starts = [offset + begin for begin, _ in parts]
        ends = [offset + end for _, end in parts]

        def read() -> list[bytes]:
            found: list[bytes] = self._client.fs.cat_ranges(
                [self._full] * len(parts), starts, ends, on_error="raise"
            )
            return found

        for (begin, end), data in zip(parts, self._client.do("read", self._path, read), strict=True):
            if len(data) != end - begin:
                raise self._truncated(offset + end)
            flat[begin:end] = data

    def _truncated(self, needed: int) -> DamagedError:
        where = self._client.describe(self._path)
        return DamagedError(f"{where} is truncated: bytes up to {needed} are needed of {self._file_bytes}")
