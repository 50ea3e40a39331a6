"""The save in flight, as the training thread sees it: its thread, its handle and its outcome."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from engine.errors import HoldfastError, SaveFailedError, SaveStuckError
from engine.save import events
from engine.save.commit import SaveInfo
from engine.save.job import Job, JobRunner
from engine.save.outcomes import Outcomes, SaveHandle
from engine.save.unclosed import exit_without

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Flight:
    """One save at a time. Used from the training thread only."""

    runner: JobRunner
    outcomes: Outcomes
    stuck: bool = False
    """Whether the save in flight hangs in a call that never returns."""
    handle: SaveHandle | None = None
    """The newest save's."""
    _thread: threading.Thread | None = None
    _step: int = 0
    """The step that the thread saves or has saved."""

    def start(self, job: Job) -> None:
        """Start the background thread that writes the save."""
        self.handle, self._step = job.handle, job.info.step
        # Not a daemon: a save that nobody waits for still finishes before the interpreter exits.
        self._thread = threading.Thread(
            target=self.runner.run, args=(job,), name=f"holdfast-save-{job.info.step}", daemon=False
        )
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether the background thread is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def committed(self) -> bool:
        """Whether the newest save is done and committed."""
        return self.handle is not None and self.handle.done() and not self.handle.failed()

    @property
    def failed(self) -> bool:
        """Whether the newest save is done and has failed."""
        return self.handle is not None and self.handle.failed()

    def wait(self, most_secs: float, timeout: float | None = None) -> None:
        """Wait until the save in flight ends, committed or failed.

        Raises: TimeoutError after `timeout` seconds. Without a timeout, SaveStuckError after `most_secs`,
            when every deadline of the save has passed; later calls no longer wait for it.
        """
        thread = self._thread
        if thread is None:
            return
        thread.join((0.0 if self.stuck else most_secs) if timeout is None else timeout)
        if not thread.is_alive():
            self._thread, self.stuck = None, False
            return
        running = f"the save of step {self._step} is still running"
        if timeout is not None:
            raise TimeoutError(running)
        if not self.stuck:
            self.stuck = True
            exit_without(thread)
        raise SaveStuckError(
            f"rank {self.runner.channel.rank}: {running} after {most_secs:g} s more, {self.runner.doing}: "
            "the storage does not answer. Check the kernel log and the mount"
        )

    def take_failure(self, *, newest: bool = False) -> SaveFailedError | None:
        """The newest save's failure, if the training thread must raise it; it then counts as reported.

        `newest`: no further save follows, so no failure is tolerated.
        """
        failure = self.handle.unreported_failure() if self.handle is not None else None
        if self.handle is None or failure is None or (not newest and self.outcomes.tolerates(failure)):
            return None
        self.handle.mark_reported()
        return failure if newest else self.outcomes.final(failure)

    def never_began(self, info: SaveInfo, secs: float, error: HoldfastError) -> SaveHandle:
        """The handle of a save that failed before it began: a rank was missing, or the previous save hangs.

        Raises: `error`, unless it is tolerated. Rank 0 has already decided that about a save that hangs.
        """
        self.outcomes.note(None)
        if not isinstance(error, SaveStuckError) and not self.outcomes.tolerates(error):
            raise error
        failure = SaveFailedError(f"the checkpoint of step {info.step} was not saved: {error}")
        failure.__cause__ = error
        log.error("%s", failure)
        self.runner.on_event(
            events.ended(
                "save_failed",
                info.step,
                info.reasons,
                blocked_secs=secs,
                total_secs=secs,
                secs={},
                size_bytes=0,
                cause=str(error),
            )
        )
        self.handle = SaveHandle(info.step)
        self.handle.set_failure(failure)
        return self.handle
