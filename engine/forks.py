"""A forked child has copies of its parent's objects and must not act through them.

DataLoader workers, `multiprocessing` with fork and `os.fork` create a child that owns nothing: the lease, the
save in flight, the threads and the connections belong to the parent. Yet most children exit through Python,
which runs exit hooks, finalizers and `with` blocks on those copies.

There are two means, because each has a gap. An object that is called checks its `Home`, which also works
after a fork in C. Whatever runs without a call (signal handlers, finalizers) is disabled by `in_child`.
"""

from __future__ import annotations

import functools
import itertools
import os
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any


class Home:
    """The process that created this object."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def left(self) -> bool:
        """Whether the current process is another one: a forked child."""
        return os.getpid() != self.pid


_calls: dict[int, tuple[weakref.ref[Any], Callable[[Any], Any]]] = {}
"""Objects and functions. Not WeakMethod: it complains at exit when it dies before its object."""
_numbers = itertools.count()


def in_child(method: Callable[[], Any]) -> None:
    """Call a bound method in every forked child, for as long as its object lives."""
    assert isinstance(method, MethodType)
    number = next(_numbers)
    forget = functools.partial(_forget, _calls, number)
    _calls[number] = weakref.ref(method.__self__, forget), method.__func__


def _forget(calls: dict[int, Any], number: int, reference: object) -> None:
    calls.pop(number, None)  # an argument: at exit the module's own names may be gone


def _after_fork() -> None:
    for reference, function in list(_calls.values()):
        live = reference()
        if live is not None:
            function(live)


os.register_at_fork(after_in_child=_after_fork)
