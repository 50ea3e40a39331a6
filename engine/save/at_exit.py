"""Saves that nobody waited for finish before the interpreter takes its thread pools away.

`atexit` would be too late: at exit the interpreter first shuts down concurrent.futures, then joins threads,
then runs `atexit`. A save still being written would find that it can no longer start the threads that it
writes with.

A save that hangs in a call that never returns must not keep the process, either: the interpreter would join
its thread for ever, and those of its pools.

In a forked child nothing is finished: the saves are the parent's, and so are the threads that make them.
"""

from __future__ import annotations

# Imported for its own hook, which has to be registered before ours: hooks run last in, first out.
import concurrent.futures.thread  # noqa: F401
import itertools
import os
import threading
from collections.abc import Callable

from engine.forks import Home
from engine.process_end import end_at_once

_waiting: dict[int, Callable[[], None]] = {}
_numbers = itertools.count()
_lock = threading.Lock()
_registered = False
_hanging: list[threading.Thread] = []
_home = Home()


def call_at_exit(finish: Callable[[], None]) -> Callable[[], None]:
    """Have `finish` called when the main thread has ended. Returns what takes it back again."""
    global _registered
    _start_anew_in_child()
    with _lock:
        number = next(_numbers)
        _waiting[number] = finish
        if not _registered:
            # Underscored, but concurrent.futures has no other way either; a test notices when it moves.
            threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
            _registered = True

    def forget() -> None:
        with _lock:
            _waiting.pop(number, None)

    return forget


def leave_despite(thread: threading.Thread) -> None:
    """Do not wait for `thread` at exit. For one that hangs: whoever waited for it has its error."""
    with _lock:
        _hanging.append(thread)


def anything_hangs() -> bool:
    """Whether a thread that nobody waits for any more is still at it."""
    with _lock:
        _hanging[:] = [thread for thread in _hanging if thread.is_alive()]
        return bool(_hanging)


def _start_anew_in_child() -> None:
    """Forget what the parent waits for. The lock may have been held by one of its threads."""
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
        # Other exit handlers do not run, as they would not if somebody killed a process that never ends.
        end_at_once(1)
