"""A forked child has copies of its parent's objects, and must not act through them.

DataLoader's workers, `multiprocessing` with fork and `os.fork` all make a child that owns nothing: the
lease, the save in flight, the threads and the connections are the parent's. Most children end through Python,
which runs exit hooks, finalizers and `with` blocks on those copies.

Two means, because each has a gap: an object that may be asked knows its `Home`, which also holds after a fork
made in C; what runs without being asked (signals, finalizers of others) is taken out by `in_child`.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any


class Home:
    """The process in which it was made."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def left(self) -> bool:
        """Whether this is another process by now: a forked child."""
        return os.getpid() != self.pid


_calls: dict[int, weakref.WeakMethod[Callable[[], Any]]] = {}
_numbers = itertools.count()


def in_child(method: Callable[[], Any]) -> None:
    """Have a bound method called in every forked child, for as long as its object lives."""
    number = next(_numbers)
    _calls[number] = weakref.WeakMethod(method, lambda _: _calls.pop(number, None))


def _after_fork() -> None:
    for reference in list(_calls.values()):
        method = reference()
        if method is not None:
            method()


os.register_at_fork(after_in_child=_after_fork)
