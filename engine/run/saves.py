"""The trainer's saves: counts failures and stops the run after too many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from engine.errors import HoldfastError, LeaseLostError, SaveFailedError, SaveStuckError
from engine.run.recorder import Recorder
from engine.run.schedule import may_skip
from engine.save.outcomes import SaveHandle

log = logging.getLogger(__name__)


class Saver(Protocol):
    """The methods of a Checkpointer used here."""

    @property
    def failed_saves(self) -> int: ...
    def save(
        self, step: int, *, epoch: int, tokens: int, metrics: Mapping[str, float], reasons: tuple[str, ...]
    ) -> SaveHandle: ...
    def poll(self) -> None: ...
    def prepare(self) -> None: ...
    def wait(self, timeout: float | None = None) -> None: ...


class Saves:
    """Starts saves, and lets training continue until `max_failures` of them fail in a row.

    Ranks learn of a failure at different times, so no rank stops alone: it votes to stop in the next step,
    and all ranks stop after it.
    """

    def __init__(self, saver: Saver, recorder: Recorder, max_failures: int) -> None:
        self._saver, self._recorder = saver, recorder
        self._max_failures = max(1, max_failures)
        self._last_failure: HoldfastError | None = None
        self._fatal: HoldfastError | None = None
        self._saved_step: int | None = None
        self._handle: SaveHandle | None = None

    def must_stop(self) -> bool:
        """Whether this rank wants to end the run; also notes a save that failed since the last call.

        Call it only right before a vote. If only some ranks know of a failure then, the next save reports it
        on all of them.
        """
        self._note(self._saver.poll)
        return self._fatal is not None or self._too_many

    @property
    def _too_many(self) -> bool:
        return self._saver.failed_saves >= self._max_failures

    def prepare(self) -> None:
        """Allocate the staging buffer, once the optimizer has its state. Collective."""
        self._note(self._saver.prepare)

    def save(
        self, step: int, *, epoch: int, tokens: int, metrics: Mapping[str, float], reasons: tuple[str, ...]
    ) -> None:
        """Start the save of `step`; while another one runs, only a plain interval save may be skipped."""
        if step == self._saved_step:
            return
        if not may_skip(reasons):
            self._note(self._saver.wait)
            if self._too_many:  # the same on all ranks, since nothing is in flight
                return
        self._recorder.announce_save(step, reasons, metrics)

        def start() -> None:
            handle = self._saver.save(step, epoch=epoch, tokens=tokens, metrics=metrics, reasons=reasons)
            if handle.skipped:
                self._recorder.save_skipped(step)
                log.info(
                    "no save at step %d: the previous one is still being written (--save_policy skip)", step
                )
            else:
                self._saved_step = step
                self._handle = handle

        # The first call may report an earlier failure instead of saving. It does so on all ranks or on none,
        # so all ranks retry, or none.
        if not self._note(start) and not self._too_many:
            self._note(start)

    def already_saved(self, step: int) -> None:
        """`step` was just restored: do not save it again."""
        self._saved_step = step

    def in_flight(self) -> int | None:
        """The step whose save is in flight on this rank, or None."""
        return self._handle.step if self._handle is not None and not self._handle.done() else None

    def finish(self) -> None:
        """Wait for the save in flight, and note a failure."""
        self._note(self._saver.wait)

    def settle(self) -> None:
        """Wait for the save in flight. Raises the error of `reason_to_stop` if the last save failed."""
        self.finish()
        if self._fatal is not None or self._saver.failed_saves > 0:
            raise self.reason_to_stop()

    def reason_to_stop(self) -> HoldfastError:
        """The error that ends the run; its message says what to do."""
        self._note(self._saver.poll)
        if self._fatal is not None:
            return self._fatal
        count = self._saver.failed_saves
        cause = f": {self._last_failure}" if self._last_failure is not None else ""
        return SaveFailedError(
            f"{count} save{'s' * (count != 1)} in a row failed{cause}. Earlier checkpoints are intact: fix "
            "the cause and continue with --resume latest"
        )

    def _note(self, action: Callable[[], object]) -> bool:
        """Run `action`; returns False if it reports a failed save. Any other error will stop the run."""
        try:
            action()
        except SaveFailedError as error:
            self._last_failure = error
            if isinstance(error.__cause__, LeaseLostError):
                self._fatal = error.__cause__
            elif isinstance(error, SaveStuckError):  # this process can save no more
                self._fatal = error
            return False
        except HoldfastError as error:
            self._fatal = error
        return True
