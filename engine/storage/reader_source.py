"""An open file as the source of another file, window by window, in a few recycled buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator

from engine.storage.aligned_memory import PAGE_BYTES, map_pages
from engine.storage.base import Reader
from engine.storage.source import Window, spans

Check = Callable[[int, memoryview], None]
"""Called with every piece of a file and where it begins, before any of it is given; may raise."""


class ReaderSource:
    """The file of a reader, which has to stay open as long as it is written from.

    Args:
        check: sees every byte once, in order.
        read_bytes: how much to read at a time at least: a store answers several requests side by side.
    """

    def __init__(self, reader: Reader, check: Check, *, read_bytes: int = 0) -> None:
        self.file_bytes = reader.file_bytes
        self._reader, self._check, self._read_bytes = reader, check, read_bytes

    def windows(self, window_bytes: int) -> Generator[Window]:
        piece_bytes = max(1, self._read_bytes // window_bytes) * window_bytes
        buffers = Buffers(min(piece_bytes, self.file_bytes))
        for begin, end in spans(self.file_bytes, piece_bytes):
            cuts = spans(end - begin, window_bytes)
            memory, release = buffers.take(len(cuts))
            piece = memory[: end - begin]
            self._reader.read_into(begin, piece)
            self._check(begin, piece)
            for first, last in cuts:
                yield Window(begin + first, begin + last, memory[first:], release)


class Buffers:
    """Memory of one size for direct I/O, as many as are in use at once: what is released is used again."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        self._free: list[memoryview] = []
        self._lock = threading.Lock()

    def take(self, windows: int = 1) -> tuple[memoryview, Callable[[], None]]:
        """A buffer, and what each of the windows in it calls when it is written."""
        memory = self._free.pop() if self._free else self._new()
        left = windows

        def release() -> None:
            nonlocal left
            with self._lock:
                left -= 1
                if not left:
                    self._free.append(memory)

        return memory, release

    def _new(self) -> memoryview:
        pages, skip = map_pages(self._size_bytes)
        return memoryview(pages)[skip : skip + self._size_bytes]
