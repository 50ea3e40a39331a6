"""Finishes Checkpointers that nobody closed: at exit, or when no reference to one is left.

At exit `atexit` would be too late: the interpreter first shuts down concurrent.futures, then joins threads,
then runs `atexit`. A save still being written could no longer start the threads that it writes with.

A save that hangs in a call that never returns must not keep the process alive either, but the interpreter
would join its threads forever.

A Checkpointer may lose its last reference when a notebook's cell is run again or a function returns. It is
then closed on a thread of its own: the garbage collector may run anywhere, even on a thread that closing
waits for.

In a forked child nothing is finished: the saves and their threads belong to the parent.
"""

from __future__ import annotations

# Imported for its exit hook, which must be registered before ours: hooks run last in, first out.
import concurrent.futures.thread  # noqa: F401
import gc
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import MethodType
from typing import ParamSpec

from engine.forks import Home
from engine.process_end import end_at_once

P = ParamSpec("P")

_waiting: dict[int, Callable[[], None]] = {}
_numbers = itertools.count()
_lock = threading.Lock()
_registered = False
_hanging: list[threading.Thread] = []
_closing: list[threading.Thread] = []
_home = Home()


def call_at_exit(finish: Callable[[], None]) -> Callable[[], None]:
    """Call `finish` once the main thread has ended. Returns a function that cancels this."""
    global _registered
    _start_anew_in_child()
    with _lock:
        number = next(_numbers)
        _waiting[number] = finish
        if not _registered:
            # Private, but concurrent.futures uses it, too, and there is no other way; a test notices when it
            # moves.
            threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
            _registered = True

    def cancel() -> None:
        with _lock:
            _waiting.pop(number, None)

    return cancel


def forgetful(method: Callable[P, None]) -> Callable[P, None]:
    """A bound method that does not keep its object alive, and does nothing once the object is gone."""
    assert isinstance(method, MethodType)
    # Not WeakMethod: it complains at exit when it dies before its object.
    reference, function = weakref.ref(method.__self__), method.__func__

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        live = reference()
        if live is not None:
            function(live, *args, **kwargs)

    return call


def close_unreferenced(close: Callable[[], None]) -> None:
    """Call `close` soon, on another thread; the interpreter waits for it at exit."""
    thread = threading.Thread(target=close, name="holdfast-unheld", daemon=False)
    _closing.append(thread)
    thread.start()
    call_at_exit(thread.join)


def wait_for_unreferenced(timeout_secs: float) -> bool:
    """Collect objects without references and wait until they are closed. Returns whether there were any."""
    gc.collect()
    end = time.monotonic() + timeout_secs
    threads = list(_closing)
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    _closing[:] = [thread for thread in _closing if thread.is_alive()]
    return bool(threads)


def exit_without(thread: threading.Thread) -> None:
    """Do not wait for a hanging `thread` at exit. Its error must have been raised already."""
    with _lock:
        _hanging.append(thread)


def anything_hangs() -> bool:
    """Whether a thread passed to `exit_without` is still running."""
    with _lock:
        _hanging[:] = [thread for thread in _hanging if thread.is_alive()]
        return bool(_hanging)


def _start_anew_in_child() -> None:
    """Forget what the parent waits for. One of its threads may have held the lock during the fork."""
    global _lock, _home
    if _home.left:
        _home = Home()
        _lock = threading.Lock()
        _waiting.clear()
        _hanging.clear()


os.register_at_fork(after_in_child=_start_anew_in_child)


def _finish_all() -> None:
    _start_anew_in_child()
    while True:
        with _lock:
            if not _waiting:
                break
            _, finish = _waiting.popitem()
        finish()
    if anything_hangs():
        # Other exit handlers do not run. Nor would they if somebody killed a process that never ends.
        end_at_once(1)
