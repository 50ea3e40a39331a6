"""Try again what a network may have broken: capped exponential back-off with jitter, and a deadline."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from engine.errors import StorageUnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Retry:
    """A policy: at most `attempts` tries, none begun later than `deadline_secs` after the first.

    The pause before try n+1 is drawn from [half, all] of `first_secs * 2**(n-1)`, at most `cap_secs`: the
    jitter keeps many ranks from coming back in step. Only StorageUnavailableError is worth another try.
    """

    def __init__(
        self,
        *,
        attempts: int = 8,
        deadline_secs: float = 120.0,
        first_secs: float = 0.25,
        cap_secs: float = 20.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        if attempts < 1 or deadline_secs < 0 or not 0 <= first_secs <= cap_secs:
            raise ValueError(f"{attempts} tries in {deadline_secs} s, pausing {first_secs} to {cap_secs} s")
        self._attempts = attempts
        self._deadline_secs = deadline_secs
        self._first_secs = first_secs
        self._cap_secs = cap_secs
        self._sleep = sleep
        self._clock = clock
        # Its own generator, seeded by the system: drawing must not disturb the training's random state.
        self._rng = rng or random.Random()

    def pause_secs(self, failures: int) -> float:
        """Seconds to wait after the given number of failures, from 1."""
        longest = min(self._first_secs * 2.0 ** min(failures - 1, 60), self._cap_secs)
        return longest * self._rng.uniform(0.5, 1.0)

    def call(self, what: str, attempt: Callable[[], T]) -> T:
        """The first result of `attempt`; its last StorageUnavailableError when there is no more trying.

        Other errors pass at once. A storm of failures is two log lines, not one per try.
        """
        begun = self._clock()
        failures = 0
        while True:
            try:
                result = attempt()
            except StorageUnavailableError as error:
                failures += 1
                pause = self.pause_secs(failures)
                spent = self._clock() - begun
                if failures >= self._attempts or spent + pause > self._deadline_secs:
                    raise _given_up(error, failures, spent) from None
                if failures == 1:
                    log.warning("%s; trying again for up to %.0f s", error, self._deadline_secs)
                self._sleep(pause)
            else:
                if failures:
                    log.info("%s: done at try %d, after %.1f s", what, failures + 1, self._clock() - begun)
                return result


def _given_up(error: StorageUnavailableError, failures: int, spent: float) -> StorageUnavailableError:
    final = StorageUnavailableError(f"{error} (given up after {failures} tries in {spent:.0f} s)")
    final.errno = error.errno
    return final
