"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 as one kind of request: save and leave, within a deadline.

A signal only leaves its number in a pipe: the C level does that even while the main thread sits in a
collective, where a Python handler would never run. A thread of our own reads the pipe, so that the
deadline and the second signal hold whatever the main thread is doing.

Seen with torchrun 2.13: a signal to the whole job reaches a worker twice within 0.1 s, a second Ctrl+C
arrives as SIGTERM, and workers are killed 30 s after the first.
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
"""SIGUSR1 and SIGUSR2 are what Slurm's --signal sends before the time is up. Where ranks got different ones,
the last of these counts."""
TORCHRUN_GRACE_SECS = 25.0
"""torchrun kills workers 30 s after it passed a signal on; the rest is for the exit itself."""
STARTUP_GRACE_SECS = 5.0
"""Before the first step nothing needs saving; long enough for rank 0 to print why another rank has ended."""
REPEAT_SECS = 2.0
"""A second signal this long after the first is meant; an earlier one is the same request, delivered twice."""

ORPHAN_CHECK_SECS = 2.0
"""How often to ask whether torchrun is still there."""

Clock = Callable[[], float]
Verdict = Literal["first", "same", "leave"]


def grace_within(grace_secs: float, environ: Mapping[str, str] = os.environ) -> float:
    """The time between a signal and the end of the process, in seconds."""
    return min(grace_secs, TORCHRUN_GRACE_SECS) if "TORCHELASTIC_RUN_ID" in environ else grace_secs


@dataclass(slots=True)
class Request:
    """What the signals so far mean. Times are the caller's, in seconds of one monotonic clock."""

    grace_secs: float
    signum: int | None = None
    since: float = 0.0

    def receive(self, signum: int, now: float) -> Verdict:
        """Take one signal in: the first, the same request once more, or the order to leave at once."""
        if self.signum is None:
            self.signum, self.since = signum, now
            return "first"
        return "leave" if now - self.since >= REPEAT_SECS else "same"

    def secs_left(self, now: float) -> float | None:
        """Until the process must be gone, at least 0; None without a request."""
        return None if self.signum is None else max(0.0, self.since + self.grace_secs - now)


@dataclass(slots=True, weakref_slot=True)
class Preemption:
    """Listens for signals, and ends the process when the orderly way out takes too long.

    `leave(code, sentence)` must not return to its caller in production; tests let it. `orphaned` is asked
    every few seconds; once it says yes, that counts as a SIGTERM.
    """

    request: Request
    leave: Callable[[int, str], None] = field(default=lambda code, sentence: leave_at_once(code, sentence))
    clock: Clock = time.monotonic
    orphaned: Callable[[], bool] = field(default=lambda: False)
    _previous: dict[int, object] = field(default_factory=dict)
    _pipe: tuple[int, int] | None = None

    @property
    def signum(self) -> int | None:
        """The first signal's number, or None: what the step's reduction carries to the other ranks."""
        return self.request.signum

    @property
    def secs_left(self) -> float | None:
        """Until the process must be gone; None without a signal."""
        return self.request.secs_left(self.clock())

    def install(self) -> None:
        """Take the signals over, from the main thread, for the rest of the process."""
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        self._pipe = read_fd, write_fd
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, _nothing)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        in_child(self._leave_to_parent)
        threading.Thread(target=self.watch, args=(read_fd,), name="preemption", daemon=True).start()

    def allow(self, grace_secs: float) -> None:
        """From now on there is something to save, which takes longer than just leaving."""
        self.request.grace_secs = grace_secs

    def uninstall(self) -> None:
        """Give the signals back; the watching ends with the pipe."""
        if self._pipe is None:
            return
        signal.set_wakeup_fd(-1)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        os.close(self._pipe[1])
        self._pipe = None

    def _leave_to_parent(self) -> None:
        """In a forked child: its signals must not come out of the parent's end of the pipe.

        SIGTERM ends it again, for `terminate()`. The others often go to the whole process group, and
        a data worker that died of one would take the parent's last save with it.
        """
        if self._pipe is None:
            return
        signal.set_wakeup_fd(-1)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler if signum == signal.SIGTERM else signal.SIG_IGN)  # type: ignore[arg-type]
        os.close(self._pipe[1])  # the other end is closed by the thread that reads it, which is the parent's
        self._pipe = None

    def watch(self, read_fd: int) -> None:
        """Read signal numbers until the pipe closes, the deadline passes or a second signal asks to leave."""
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
                    self._leave("saving and leaving took longer than the grace time after the signal")
                    return
        finally:
            os.close(read_fd)

    def _patience_secs(self) -> float:
        left = self.request.secs_left(self.clock())
        return ORPHAN_CHECK_SECS if left is None else left

    def _leaves_on(self, number: int) -> bool:
        if number not in SIGNALS or self.request.receive(number, self.clock()) != "leave":
            return False
        self._leave("a second signal: leaving without waiting for the save")
        return True

    def _leave(self, why: str) -> None:
        assert self.request.signum is not None
        self.leave(128 + self.request.signum, why)


def leave_at_once(code: int, sentence: str) -> None:
    """End the process without any clean-up, which may be what hangs."""
    rank = os.environ.get("RANK", "0")
    end_at_once(code, f"[rank {rank}] {sentence}", flush=False)


def _nothing(signum: int, frame: FrameType | None) -> None:
    """A handler must exist for the C level to write to the pipe; all else happens in the watching thread."""
