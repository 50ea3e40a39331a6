"""The source of a written file: its size, and its bytes in windows that become ready in order.

A snapshot that is still being copied, a conversion's stream and a file of another storage are all sources.
So no caller needs memory or disk space of the file's size, and no storage knows who waits, digests or reads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol


def nothing_to_release() -> None:
    """For windows whose memory need not be released."""


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes [begin, end) of a file, at the start of `memory`.

    memory: contiguous bytes, unchanged until `release` is called. The bytes after the window's own are
        padding: a direct write includes them to fill its last sector.
    """

    begin: int
    end: int
    memory: memoryview
    release: Callable[[], None] = nothing_to_release

    @property
    def view(self) -> memoryview:
        """The window's own bytes."""
        return self.memory[: self.end - self.begin]


class Source(Protocol):
    """The bytes of a file to write."""

    @property
    def file_bytes(self) -> int:
        """Size of the whole file in bytes."""
        ...

    def windows(self, window_bytes: int) -> Generator[Window]:
        """Consecutive windows of `window_bytes`, the last possibly shorter, from the first byte on.

        The writer chooses the size, so that a part of an upload is one window. It pulls from one thread,
        possibly before it has released earlier windows. Whatever this raises passes to the caller, and
        nothing is left of the file.
        """
        ...


class BufferSource:
    """A file in memory. For direct I/O, the memory starts on a page boundary and is padded to one.

    Raises: ValueError when the memory has fewer bytes than the file.
    """

    def __init__(self, memory: memoryview, file_bytes: int | None = None) -> None:
        self._memory = memoryview(memory).cast("B")
        self.file_bytes = len(self._memory) if file_bytes is None else file_bytes
        if not 0 <= self.file_bytes <= len(self._memory):
            raise ValueError(f"a file of {self.file_bytes} bytes cannot lie in {len(self._memory)} bytes")

    def windows(self, window_bytes: int) -> Generator[Window]:
        for begin, end in spans(self.file_bytes, window_bytes):
            yield Window(begin, end, self._memory[begin:])


def spans(total_bytes: int, span_bytes: int) -> list[tuple[int, int]]:
    """Consecutive ranges [begin, end) that cover `total_bytes`; the last may be short."""
    return [(begin, min(begin + span_bytes, total_bytes)) for begin in range(0, total_bytes, span_bytes)]


def in_order(source: Source, window_bytes: int) -> Generator[Window]:
    """The windows of a source, proven to be the whole file. Raises ValueError where they are not.

    To be closed, or exhausted, so that the source can stop what it does beside them.
    """
    expected = iter(spans(source.file_bytes, window_bytes))
    with closing(source.windows(window_bytes)) as windows:
        for window in windows:
            if (window.begin, window.end) != next(expected, None):
                raise ValueError(
                    f"the source of a file of {source.file_bytes} bytes gave bytes {window.begin} to "
                    f"{window.end} out of turn"
                )
            yield window
    missing = next(expected, None)
    if missing is not None:
        raise ValueError(f"the source of a file of {source.file_bytes} bytes ended at byte {missing[0]}")
