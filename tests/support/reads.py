"""Count the bytes that are really fetched from shard files and indexes of a local directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from engine.native.kernels import Place
from engine.storage.local import LocalStorage
from engine.storage.reading import LocalReader


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Bytes read meanwhile in this process: "shards" through open readers, "small" of whole small files.

    What is read from the page cache and then read again from the disk counts twice.
    """
    counts: Counter[str] = Counter()
    read_into, at_hand, whole = LocalReader.read_into, LocalReader.read_cached, LocalStorage.read_bytes
    patched: Any = LocalReader
    storage: Any = LocalStorage

    def counting_into(reader: LocalReader, offset: int, view: memoryview) -> None:
        read_into(reader, offset, view)
        counts["shards"] += view.nbytes

    def counting_at_hand(
        reader: LocalReader, offset: int, places: Sequence[Place], block_bytes: int
    ) -> tuple[int, bytes]:
        count, digests = at_hand(reader, offset, places, block_bytes)
        counts["shards"] += count
        return count, digests

    def counting_whole(self: LocalStorage, path: str, *, max_bytes: int) -> bytes:
        raw = whole(self, path, max_bytes=max_bytes)
        counts["small"] += len(raw)
        return raw

    patched.read_into, patched.read_cached = counting_into, counting_at_hand
    storage.read_bytes = counting_whole
    try:
        yield counts
    finally:
        patched.read_into, patched.read_cached = read_into, at_hand
        storage.read_bytes = whole
