"""The save in flight, as the training thread sees it: its thread, its handle, and what became of it."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from engine.errors import HoldfastError, SaveFailedError, SaveStuckError
from engine.save.at_exit import leave_despite
from engine.save.commit import SaveInfo
from engine.save.handle import SaveHandle
from engine.save.job import Job, JobRunner
from engine.save.outcomes import Outcomes

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Flight:
    """One save at a time. Used from the training thread only."""

    runner: JobRunner
    outcomes: Outcomes
    stuck: bool = False
    """Whether the save in flight hangs in a call that never returns."""
    handle: SaveHandle | None = None
    """Of the newest save."""
    _thread: threading.Thread | None = None
    _step: int = 0
    """What the thread saves, or has saved."""

    def start(self, job: Job) -> None:
        """Have the background thread write it."""
        self.handle, self._step = job.handle, job.info.step
        # Not a daemon: a save that everyone forgot about still finishes before the interpreter exits.
        self._thread = threading.Thread(
            target=self.runner.run, args=(job,), name=f"holdfast-save-{job.info.step}", daemon=False
        )
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether the background thread is at work."""
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
        """Wait for the save in flight, whatever its outcome.

        Raises: TimeoutError after `timeout` seconds; without any, SaveStuckError after `most_secs`, by which
            every deadline of the save has passed. From then on it is not waited for any more.
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
            leave_despite(thread)
        raise SaveStuckError(
            f"rank {self.runner.channel.rank}: {running} after {most_secs:g} s more, {self.runner.doing}: "
            "the storage does not answer. Look at the kernel log and the mount"
        )

    def take_failure(self, *, newest: bool = False) -> SaveFailedError | None:
        """What has to be raised of the newest save, if that has failed and nobody has been told.

        `newest`: there will be no other save, so nothing is endured.
        """
        failure = self.handle.untold_failure() if self.handle is not None else None
        if self.handle is None or failure is None or (not newest and self.outcomes.endures(failure)):
            return None
        self.handle.mark_told()
        return failure if newest else self.outcomes.final(failure)

    def never_began(self, info: SaveInfo, secs: float, error: HoldfastError) -> SaveHandle:
        """A save that not all ranks came to, or that found the one before hanging: failed like any other.

        Raises: `error`, unless it is endured; that rank 0 has decided of one that hangs.
        """
        self.outcomes.note(None)
        if not isinstance(error, SaveStuckError) and not self.outcomes.endures(error):
            raise error
        failure = SaveFailedError(f"the checkpoint of step {info.step} was not saved: {error}")
        failure.__cause__ = error
        log.error("%s", failure)
        event = {"event": "save_failed", "step": info.step, "blocked_secs": secs, "secs": secs}
        event |= {"reasons": list(info.reasons), "secs_by_cause": {}, "bytes": 0, "cause": str(error)}
        self.runner.on_event(event)
        self.handle = SaveHandle(info.step)
        self.handle.set_failure(failure)
        return self.handle
