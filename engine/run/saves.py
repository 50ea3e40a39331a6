"""The trainer's side of saving: failures counted, and the word to stop when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from engine.errors import HoldfastError, LeaseLostError, SaveFailedError, SaveStuckError
from engine.run.recorder import Recorder
from engine.run.schedule import may_skip
from engine.save.handle import SaveHandle

log = logging.getLogger(__name__)


class Saver(Protocol):
    """The part of a Checkpointer that saving needs."""

    @property
    def failed_saves(self) -> int: ...
    def save(
        self, step: int, *, epoch: int, tokens: int, metrics: Mapping[str, float], reasons: tuple[str, ...]
    ) -> SaveHandle: ...
    def poll(self) -> None: ...
    def prepare(self) -> None: ...
    def wait(self, timeout: float | None = None) -> None: ...


class Saves:
    """Saves, and keeps training through failures until there are `max_failures` in a row.

    When a failure becomes known differs between ranks, so a rank never stops by itself: it says `must_stop`
    in the next step's vote, and all stop after the same step.
    """

    def __init__(self, saver: Saver, recorder: Recorder, max_failures: int) -> None:
        self._saver, self._recorder = saver, recorder
        self._max_failures = max(1, max_failures)
        self._last_failure: HoldfastError | None = None
        self._fatal: HoldfastError | None = None
        self._saved_step: int | None = None
        self._handle: SaveHandle | None = None

    def must_stop(self) -> bool:
        """Whether this rank knows that training cannot go on; notes a save that has failed meanwhile.

        Ask right before a vote and nowhere else: a failure that only some ranks know of by then is told to
        all of them alike by the next save.
        """
        self._note(self._saver.poll)
        return self._fatal is not None or self._too_many

    @property
    def _too_many(self) -> bool:
        return self._saver.failed_saves >= self._max_failures

    def prepare(self) -> None:
        """Take the memory for snapshots, once the state has its structure. Every rank calls it."""
        self._note(self._saver.prepare)

    def save(
        self, step: int, *, epoch: int, tokens: int, metrics: Mapping[str, float], reasons: tuple[str, ...]
    ) -> None:
        """Start the save of `step`; only a plain interval save may fall out because the writer is busy."""
        if step == self._saved_step:
            return
        if not may_skip(reasons):
            self._note(self._saver.wait)
            if self._too_many:  # the same on all ranks: nothing is in flight
                return
        self._recorder.announce_save(step, reasons, metrics)

        def start() -> None:
            handle = self._saver.save(step, epoch=epoch, tokens=tokens, metrics=metrics, reasons=reasons)
            if handle.skipped:
                self._recorder.save_skipped(step)
                log.info(
                    "no save at step %d: the one before is still being written (--save_policy skip)", step
                )
            else:
                self._saved_step = step
                self._handle = handle

        # The first call may only have brought the news of an earlier failure; it did not save then. It brings
        # them on all ranks alike, so all of them try again, or none.
        if not self._note(start) and not self._too_many:
            self._note(start)

    def already_saved(self, step: int) -> None:
        """`step` is what was restored: saving it once more would change nothing."""
        self._saved_step = step

    def in_flight(self) -> int | None:
        """The step whose save this rank has not seen the end of, if any."""
        return self._handle.step if self._handle is not None and not self._handle.done() else None

    def finish(self) -> None:
        """Wait for the save in flight; a failure is noted."""
        self._note(self._saver.wait)

    def settle(self) -> None:
        """Wait for the save in flight. Raises what `reason_to_stop` says when the last save has failed."""
        self.finish()
        if self._fatal is not None or self._saver.failed_saves > 0:
            raise self.reason_to_stop()

    def reason_to_stop(self) -> HoldfastError:
        """The error that ends the run, in a sentence with what to do."""
        self._note(self._saver.poll)
        if self._fatal is not None:
            return self._fatal
        count = self._saver.failed_saves
        cause = f": {self._last_failure}" if self._last_failure is not None else ""
        return SaveFailedError(
            f"{count} save{'s' * (count != 1)} in a row failed{cause}. Checkpoints committed before are "
            "untouched: fix the cause and carry on with --resume latest"
        )

    def _note(self, action: Callable[[], object]) -> bool:
        """Run `action`; False when it brought news of a failed save. Any other error will stop the run."""
        try:
            action()
        except SaveFailedError as error:
            self._last_failure = error
            if isinstance(error.__cause__, LeaseLostError):
                self._fatal = error.__cause__
            elif isinstance(error, SaveStuckError):  # saving is over for this process
                self._fatal = error
            return False
        except HoldfastError as error:
            self._fatal = error
        return True
