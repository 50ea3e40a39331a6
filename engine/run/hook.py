"""`--on_event`: runs the user's command for each event, in a thread of its own.

A command that hangs, fails or is slow must not affect the training.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from engine.run.events import Event, encode

log = logging.getLogger(__name__)

QUEUE_EVENTS = 256
COMMAND_SECS = 60.0
"""A command that runs longer is killed, because later events wait for it."""
_SHOWN_BYTES = 500

Runner = Callable[[str, bytes], None]


def run_command(command: str, line: bytes, *, timeout_secs: float = COMMAND_SECS) -> None:
    """Run a shell command with `line` on its standard input; failures are logged, not raised.

    Its output is dropped, except standard error when it fails. It runs in its own session, so that Ctrl+C in
    the training's terminal does not stop it.
    """
    try:
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        log.warning("--on_event could not start: %s", error)
        return
    with process:  # closes the pipes: a child that left the session may hold their other end forever
        try:
            _, complaint = process.communicate(line, timeout=timeout_secs)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            log.warning("--on_event ran longer than %g s and was killed", timeout_secs)
            return
    if process.returncode != 0:
        shown = complaint[-_SHOWN_BYTES:].decode(errors="replace").strip()
        log.warning("--on_event exited with %d: %s", process.returncode, shown or "nothing on standard error")


class EventHook:
    """Passes events to a command, one at a time, in a thread of its own.

    The queue is bounded: an event that arrives while it is full is dropped and counted; `submit` never waits.
    """

    def __init__(
        self,
        command: str,
        *,
        run: Runner = run_command,
        capacity: int = QUEUE_EVENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command, self._run, self._clock = command, run, clock
        self._queue: queue.Queue[bytes | None] = queue.Queue(capacity)
        self._dropped = 0
        self._thread = threading.Thread(target=self._serve, name="on-event", daemon=True)
        self._thread.start()

    def submit(self, event: Event) -> None:
        """Queue an event; returns at once."""
        try:
            self._queue.put_nowait(encode(event))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                log.warning("--on_event cannot keep up: some events are dropped")

    def close(self, timeout_secs: float) -> bool:
        """Wait up to `timeout_secs` for the command to process the queue; True if it received every event."""
        end = self._clock() + timeout_secs
        try:
            self._queue.put(None, timeout=timeout_secs)
        except queue.Full:
            log.warning(
                "--on_event did not finish in time: %d events were not passed on", self._queue.qsize()
            )
            return False
        self._thread.join(max(0.0, end - self._clock()))
        if self._thread.is_alive():
            log.warning(
                "--on_event did not finish in time: %d events were not passed on", self._queue.qsize()
            )
        return not self._thread.is_alive() and self._dropped == 0

    def _serve(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._run(self._command, line)
            except Exception:
                log.exception("--on_event failed")
