"""Retry after network errors: capped exponential back-off with jitter, and a deadline."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from engine.errors import StorageUnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Retry:
    """A policy: at most `attempts` tries, none begun later than `deadline_secs` after the first.

    The pause before try n+1 is drawn from [half, all] of `first_secs * 2**(n-1)`, at most `cap_secs`: the
    jitter keeps many ranks from coming back in step. Only StorageUnavailableError is retried.
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
        storm: Storm | None = None,
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
        self._storm = storm or Storm(clock)

    def brief(self) -> Retry:
        """The same for clean-up after a failure: it gives up within seconds."""
        return Retry(
            attempts=min(4, self._attempts),
            deadline_secs=min(10.0, self._deadline_secs),
            first_secs=self._first_secs,
            cap_secs=self._cap_secs,
            sleep=self._sleep,
            clock=self._clock,
            rng=self._rng,
            storm=self._storm,
        )

    def pause_secs(self, failures: int) -> float:
        """Seconds to wait after the given number of failures, from 1."""
        longest = min(self._first_secs * 2.0 ** min(failures - 1, 60), self._cap_secs)
        return longest * self._rng.uniform(0.5, 1.0)

    def call(self, attempt: Callable[[], T], *, stop: threading.Event | None = None) -> T:
        """The first result of `attempt`; its last StorageUnavailableError when tries or time run out.

        Other errors pass at once. Nothing is retried once `stop` is set.
        """
        begun = self._clock()
        failures = 0
        waiting = False
        try:
            while True:
                try:
                    return attempt()
                except StorageUnavailableError as error:
                    failures += 1
                    pause = self.pause_secs(failures)
                    spent = self._clock() - begun
                    if failures >= self._attempts or spent + pause > self._deadline_secs:
                        raise _given_up(error, failures, spent) from None
                    self._storm.failed(error, first=not waiting, for_secs=self._deadline_secs)
                    waiting = True
                    if stop is not None and stop.is_set():
                        raise
                    self._sleep(pause)
        finally:
            if waiting:
                self._storm.over()


class Storm:
    """Logs once that a store is failing and once that its retries ended, however many calls notice.

    A storm lasts until no call is waiting for its next try. One that begins within `quiet_secs` after
    another was announced is not announced: where every third request fails, all of it is one storm.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, quiet_secs: float = 60.0) -> None:
        self._clock = clock
        self._quiet_secs = quiet_secs
        self._lock = threading.Lock()
        self._waiting = 0
        self._failures = 0
        self._begun = 0.0
        self._announced: float | None = None
        self._loud = False

    def failed(self, error: Exception, *, first: bool, for_secs: float) -> None:
        """A try failed and another will follow; `first`: the first failure of this call."""
        with self._lock:
            begins = first and not self._waiting
            self._waiting += first
            if begins:
                self._begun, self._failures = self._clock(), 0
                self._loud = self._announced is None or self._begun - self._announced >= self._quiet_secs
                if self._loud:
                    self._announced = self._begun
            self._failures += 1
            speak = begins and self._loud
        if speak:
            log.warning("%s; retrying for up to %.0f s", error, for_secs)

    def over(self) -> None:
        """A call that was waiting for its next try has ended, with or without success."""
        with self._lock:
            self._waiting -= 1
            speak = self._waiting == 0 and self._loud
            failures, secs = self._failures, self._clock() - self._begun
        if speak:
            log.info("retries ended: %d tries failed in %.1f s", failures, secs)


def _given_up(error: StorageUnavailableError, failures: int, spent: float) -> StorageUnavailableError:
    final = StorageUnavailableError(f"{error} (gave up after {failures} tries in {spent:.0f} s)")
    final.errno = error.errno
    return final
