"""Pauses Python's cyclic garbage collector while many short-lived objects are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import TracebackType


class CollectorPause:
    """Stops collections, on every thread, from `begin` to the end of the block.

    A plan, or a save of many tensors, makes so many small objects that full collections start. Each walks all
    of torch's objects and frees nothing. Measured: 0.11 s in a restore whose plan takes 0.05 s; 0.2 s in a
    save of 10,000 tensors that takes 0.03 s.
    """

    def __init__(self) -> None:
        self._paused = False

    def begin(self) -> None:
        """Stop collections, unless the program has done so itself."""
        if gc.isenabled():
            gc.disable()
            self._paused = True

    def __enter__(self) -> CollectorPause:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._paused:
            self._paused = False
            gc.enable()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No collections inside, on any thread."""
    with CollectorPause() as pause:
        pause.begin()
        yield
