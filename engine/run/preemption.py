"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 all mean the same: save and exit before a deadline.

A signal writes its number to a pipe. The C-level handler does that even while the main thread blocks in a
collective, where a Python handler would never run. A thread reads the pipe, so that the deadline and a second
signal take effect whatever the main thread is doing.

Seen with torchrun 2.13: a signal to the whole job reaches a worker twice within 0.1 s, a second Ctrl+C
arrives as SIGTERM, and torchrun kills workers 30 s after the first signal.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal

from engine.forks import in_child
from engine.process_end import end_at_once

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Slurm's --signal sends SIGUSR1 or SIGUSR2 before the time limit. If ranks receive different signals, the
one listed last counts."""
TORCHRUN_GRACE_SECS = 25.0
"""torchrun kills workers 30 s after it forwards a signal; the difference is for the exit itself."""
STARTUP_GRACE_SECS = 5.0
"""Before the first step there is nothing to save; this lets rank 0 print why another rank ended."""
REPEAT_SECS = 2.0
"""A second signal at least this long after the first asks to exit at once; an earlier one is a duplicate."""

ORPHAN_CHECK_SECS = 2.0
"""How often to check that torchrun still runs."""

Clock = Callable[[], float]
Verdict = Literal["first", "same", "leave"]


def grace_within(grace_secs: float, environ: Mapping[str, str] = os.environ) -> float:
    """Seconds from a signal to the end of the process."""
    return min(grace_secs, TORCHRUN_GRACE_SECS) if "TORCHELASTIC_RUN_ID" in environ else grace_secs


@dataclass(slots=True)
class Request:
    """The state of the request to stop. Times come from the caller's monotonic clock, in seconds."""

    grace_secs: float
    signum: int | None = None
    since: float = 0.0

    def receive(self, signum: int, now: float) -> Verdict:
        """Record a signal: the first, a duplicate of it, or the order to exit at once."""
        if self.signum is None:
            self.signum, self.since = signum, now
            return "first"
        return "leave" if now - self.since >= REPEAT_SECS else "same"

    def secs_left(self, now: float) -> float | None:
        """Seconds until the process must exit, at least 0; None without a request."""
        return None if self.signum is None else max(0.0, self.since + self.grace_secs - now)


@dataclass(slots=True, weakref_slot=True)
class Preemption:
    """Listens for signals, and ends the process when an orderly exit takes too long.

    `leave(code, sentence)` does not return in production, only in tests. `orphaned` is called every few
    seconds; its first True counts as a SIGTERM.
    """

    request: Request
    leave: Callable[[int, str], None] = field(default=lambda code, sentence: leave_at_once(code, sentence))
    clock: Clock = time.monotonic
    orphaned: Callable[[], bool] = field(default=lambda: False)
    _previous: dict[int, object] = field(default_factory=dict)
    _pipe: tuple[int, int] | None = None

    @property
    def signum(self) -> int | None:
        """The first signal's number, or None. The step's reduction passes it to the other ranks."""
        return self.request.signum

    @property
    def secs_left(self) -> float | None:
        """Seconds until the process must exit; None without a signal."""
        return self.request.secs_left(self.clock())

    def install(self) -> None:
        """Install the signal handlers, from the main thread, for the rest of the process."""
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        self._pipe = read_fd, write_fd
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, _nothing)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        in_child(self._leave_to_parent)
        threading.Thread(target=self.watch, args=(read_fd,), name="preemption", daemon=True).start()

    def allow(self, grace_secs: float) -> None:
        """Set the grace time; with something to save it is longer than at startup."""
        self.request.grace_secs = grace_secs

    def uninstall(self) -> None:
        """Restore the previous signal handlers; closing the pipe ends the thread."""
        if self._pipe is None:
            return
        signal.set_wakeup_fd(-1)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        os.close(self._pipe[1])
        self._pipe = None

    def _leave_to_parent(self) -> None:
        """In a forked child: stop its signals from reaching the parent through the pipe.

        SIGTERM gets its previous handler back, for `terminate()`. The other signals often go to the whole
        process group and are ignored: a data worker that died of one would ruin the parent's last save.
        """
        if self._pipe is None:
            return
        signal.set_wakeup_fd(-1)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if signum == signal.SIGTERM else signal.SIG_IGN)  # type: ignore[arg-type]
        os.close(self._pipe[1])  # the parent's thread closes the end that it reads
        self._pipe = None

    def watch(self, read_fd: int) -> None:
        """Read signal numbers until the pipe closes, the deadline passes or a second signal asks to exit."""
        try:
            while True:
                readable, _, _ = select.select([read_fd], [], [], self._patience_secs())
                if readable:
                    numbers = os.read(read_fd, 64)
                    if not numbers or any(self._leaves_on(number) for number in numbers):
                        return
                elif self.request.signum is None:
                    if self.orphaned():
                        self.request.receive(signal.SIGTERM, self.clock())
                elif self.request.secs_left(self.clock()) == 0.0:
                    self._leave("the grace time is over: exiting without waiting for the save")
                    return
        finally:
            os.close(read_fd)

    def _patience_secs(self) -> float:
        left = self.request.secs_left(self.clock())
        return ORPHAN_CHECK_SECS if left is None else left

    def _leaves_on(self, number: int) -> bool:
        if number not in SIGNALS or self.request.receive(number, self.clock()) != "leave":
            return False
        self._leave("second signal: exiting without waiting for the save")
        return True

    def _leave(self, why: str) -> None:
        assert self.request.signum is not None
        self.leave(128 + self.request.signum, why)


def leave_at_once(code: int, sentence: str) -> None:
    """End the process without clean-up, because clean-up may hang."""
    rank = os.environ.get("RANK", "0")
    end_at_once(code, f"[rank {rank}] {sentence}", flush=False)


def _nothing(signum: int, frame: FrameType | None) -> None:
    """Python writes to the pipe only if a handler exists; the thread does the rest."""
