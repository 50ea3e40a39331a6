"""Send windows with several threads while preparing the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from engine.storage.source import Window

T = TypeVar("T")


def send_windows(
    windows: Iterable[Window],
    send: Callable[[Window], T],
    threads: int,
    *,
    thread_name: str,
    stop: threading.Event | None = None,
) -> list[T]:
    """Call `send` with each window, in `threads` threads; returns the results in the windows' order.

    At most `threads` + 1 windows are out at a time: while some are sent, the calling thread pulls the next,
    which may take as long (a read, a digest). A window is released once it was sent. After the first error
    no further window is pulled or begun, and `stop` is set, so that those under way can give up.
    """
    failed = stop or threading.Event()

    def send_one(window: Window) -> T:
        if failed.is_set():
            raise _NotSent
        result = send(window)
        window.release()
        return result

    sent: list[Future[T]] = []
    under_way: set[Future[T]] = set()
    with ThreadPoolExecutor(threads, thread_name_prefix=thread_name) as pool:
        try:
            for window in windows:
                sent.append(pool.submit(send_one, window))
                under_way.add(sent[-1])
                while len(under_way) > threads:
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            while under_way:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            failed.set()
            raise
    return [future.result() for future in sent]


class _NotSent(Exception):
    """Ends a window after another window's error, which is the one to report."""
