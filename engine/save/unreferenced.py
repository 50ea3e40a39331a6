"""Checkpointers without any reference left: a notebook's cell was run again, a function returned.

They are closed on a thread of their own: the garbage collector may run anywhere, even on the thread that
closing waits for.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from types import MethodType
from typing import ParamSpec

from engine.save.at_exit import call_at_exit

P = ParamSpec("P")

_closing: list[threading.Thread] = []


def forgetful(method: Callable[P, None]) -> Callable[P, None]:
    """A bound method that does not hold its object, and does nothing once that is gone."""
    assert isinstance(method, MethodType)
    # WeakMethod would do, but complains at exit when it goes before its object.
    reference, function = weakref.ref(method.__self__), method.__func__

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        live = reference()
        if live is not None:
            function(live, *args, **kwargs)

    return call


def close_behind(close: Callable[[], None]) -> None:
    """Have `close` called soon, on another thread; the interpreter waits for it at exit."""
    thread = threading.Thread(target=close, name="holdfast-unheld", daemon=False)
    _closing.append(thread)
    thread.start()
    call_at_exit(thread.join)


def settle(timeout_secs: float) -> bool:
    """Collect what has no reference left, and wait until it is closed; whether there was anything."""
    gc.collect()
    end = time.monotonic() + timeout_secs
    threads = list(_closing)
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    _closing[:] = [thread for thread in _closing if thread.is_alive()]
    return bool(threads)
