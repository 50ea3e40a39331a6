"""A progress bar for long work, and a way to stop that work that leaves nothing behind."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

Step = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Meter:
    """Is told how many bytes there are to do, and then of each further number of bytes that is done."""

    on_total: Step
    progress: Step


@contextlib.contextmanager
def meter(title: str) -> Iterator[Meter]:
    """A bar with rate and time left on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield Meter(_ignore, _ignore)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield Meter(lambda total: bar.update(task, total=total), lambda count: bar.advance(task, count))


@contextlib.contextmanager
def cleaning_up_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the program as Ctrl+C does, so that what is half-written is removed; status 143."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignore(count: int) -> None:
    pass
