"""Output to a terminal: progress bars, ages, untrusted text, tables; and how SIGTERM ends a command."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

Step = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Meter:
    """`on_total` takes the number of bytes to process, `progress` those processed since the last call."""

    on_total: Step
    progress: Step


@contextlib.contextmanager
def meter(title: str) -> Iterator[Meter]:
    """On a terminal, a bar with rate and time left; elsewhere nothing."""
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
    """Let SIGTERM unwind the program as Ctrl+C does, so that half-written output is deleted; status 143."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignore(count: int) -> None:
    pass


_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def age(secs: float) -> str:
    """An age in the largest fitting unit: 3 min. A negative one, from a clock that is ahead, is "now"."""
    if secs < 1:
        return "now"
    for unit_secs, unit in _AGES:
        if secs >= unit_secs:
            return f"{secs / unit_secs:.0f} {unit}"
    return f"{secs:.0f} s"


def printable(text: str) -> str:
    """Untrusted text for a terminal: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Columns under their headers, two spaces apart; those whose numbers are in `right` are right-aligned.

    Own code because importing rich takes longer than listing twenty checkpoints.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
