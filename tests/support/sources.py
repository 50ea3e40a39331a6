"""Sources that a test watches or breaks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

from engine.storage.source import Source, Window

Hook = Callable[[int, int], None]


class Hooked:
    """Another source, with a call before each of its windows is given; what that raises passes."""

    def __init__(self, inner: Source, before: Hook) -> None:
        self._inner, self._before = inner, before

    @property
    def file_bytes(self) -> int:
        return self._inner.file_bytes

    def windows(self, window_bytes: int) -> Generator[Window]:
        with closing(self._inner.windows(window_bytes)) as windows:
            for window in windows:
                self._before(window.begin, window.end)
                yield window
