"""A shard file as a source: every byte is compared with its digest before it is passed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import DamagedError
from engine.format.digest import DIGEST_BYTES, BlockDigests, first_bad_block
from engine.format.index import ShardFile
from engine.storage.base import Storage
from engine.storage.reader_source import ReaderSource

DIGEST_BYTES_AT_ONCE = 1 << 20
"""Digesting may hold the GIL; it is released after this many bytes, since training needs it constantly."""

STORE_READ_BYTES = 32 << 20
"""Bytes read at a time from a store: in several parallel requests."""

LOOK_BYTES = 8 << 20
"""Bytes read at a time of a file that is only verified."""

Progress = Callable[[int], None]


@contextmanager
def verified(storage: Storage, path: str, shard: ShardFile, progress: Progress) -> Iterator[ReaderSource]:
    """One shard file, open, as a source.

    Args:
        progress: receives the number of bytes as they are read and verified; may raise to stop.
    Raises: NotFoundError; DamagedError if the file is not what was written, on entering or from its windows;
        StorageError.
    """
    with storage.open_reader(path) as reader:
        if reader.file_bytes != shard.file_bytes:
            raise DamagedError(
                f"{storage.describe(path)} has {reader.file_bytes} bytes: {shard.file_bytes} were written"
            )
        read_bytes = 0 if storage.is_local else STORE_READ_BYTES
        yield ReaderSource(reader, _Comparison(shard, progress).check, read_bytes=read_bytes)


def verify_file(storage: Storage, path: str, shard: ShardFile, progress: Progress) -> None:
    """Read and verify one shard file. Raises as `verified`."""
    with verified(storage, path, shard, progress) as source:
        for window in source.windows(LOOK_BYTES):
            window.release()


class _Comparison:
    """Compares a file's bytes, in order, with its digests.

    A block that a window splits is compared only with the next window: half of it has been passed on then,
    but the target file cannot be complete before its last window.
    """

    def __init__(self, shard: ShardFile, progress: Progress) -> None:
        self._shard, self._progress = shard, progress
        self._blocks, self._compared = BlockDigests(shard.block_bytes), 0

    def check(self, begin: int, view: memoryview) -> None:
        if not begin:
            self._blocks, self._compared = BlockDigests(self._shard.block_bytes), 0
        for at in range(0, len(view), DIGEST_BYTES_AT_ONCE):
            self._compare(self._blocks.update(view[at : at + DIGEST_BYTES_AT_ONCE]))
            time.sleep(0)
        if begin + len(view) == self._shard.file_bytes:
            self._compare(self._blocks.finish())
        self._progress(len(view))

    def _compare(self, found: bytes) -> None:
        bad = first_bad_block(found, self._compared, self._shard.digests)
        if bad is not None:
            raise DamagedError(
                f"{self._shard.file}: block {bad} (from byte {bad * self._shard.block_bytes}) has "
                "changed"
            )
        self._compared += len(found) // DIGEST_BYTES
