"""Trying again: how often, how long, with which pauses, and what it says."""

from __future__ import annotations

import logging
import random
import threading

import pytest

from engine.errors import NotFoundError, StorageUnavailableError
from engine.storage.retry import Retry


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.pauses.append(secs)
        self.now += secs


class Failing:
    """Fails so many times, then returns "done"."""

    def __init__(self, times: int, error: Exception | None = None) -> None:
        self.calls = 0
        self._times = times
        self._error = error or StorageUnavailableError("s3://b: away")

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._times:
            raise self._error
        return "done"


def policy(time: Time, **changes: float) -> Retry:
    return Retry(clock=time.clock, sleep=time.sleep, rng=random.Random(7), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("failures", range(8))
def test_success_after_failures(failures: int) -> None:
    time, attempt = Time(), Failing(failures)
    assert policy(time).call(attempt) == "done"
    assert attempt.calls == failures + 1
    assert len(time.pauses) == failures


def test_gives_up_after_eight() -> None:
    time, attempt = Time(), Failing(99)
    with pytest.raises(StorageUnavailableError, match=r"s3://b: away \(gave up after 8 tries in \d+ s\)"):
        policy(time).call(attempt)
    assert attempt.calls == 8
    assert len(time.pauses) == 7


def test_gives_up_at_the_deadline() -> None:
    """No try begins after it; a pause that would end beyond is not even begun."""
    time, attempt = Time(), Failing(99)
    with pytest.raises(StorageUnavailableError):
        policy(time, deadline_secs=10.0, first_secs=4.0, cap_secs=4.0).call(attempt)
    assert sum(time.pauses) <= 10.0
    assert 2 < attempt.calls < 8


def test_slow_attempts_count() -> None:
    time = Time()

    def slow() -> None:
        time.now += 50.0
        raise StorageUnavailableError("slow")

    with pytest.raises(StorageUnavailableError, match="gave up after 3 tries"):
        policy(time).call(slow)


@pytest.mark.parametrize("error", [NotFoundError("gone"), ValueError("mine")])
def test_other_errors_pass_at_once(error: Exception) -> None:
    time, attempt = Time(), Failing(99, error)
    with pytest.raises(type(error)) as raised:
        policy(time).call(attempt)
    assert raised.value is error
    assert (attempt.calls, time.pauses) == (1, [])


def test_pauses_double_up_to_the_cap_with_jitter() -> None:
    retry = policy(Time(), first_secs=1.0, cap_secs=10.0)
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (60, 10.0), (5000, 10.0)):
        drawn = {retry.pause_secs(failures) for _ in range(50)}
        assert len(drawn) > 40
        assert longest / 2 <= min(drawn) <= max(drawn) <= longest


def test_training_randomness_is_left_alone() -> None:
    state = random.getstate()
    Retry().pause_secs(3)
    assert random.getstate() == state


def test_a_storm_is_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "engine.storage.retry"):
        policy(Time()).call(Failing(6))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "6 tries failed" in caplog.text
    caplog.clear()
    policy(Time()).call(Failing(0))
    assert not caplog.records


def test_calls_that_fail_together_are_one_storm(caplog: pytest.LogCaptureFixture) -> None:
    """Eight parts of an upload meet the same outage."""
    time = Time()
    retry = policy(time)

    def nested(depth: int) -> None:
        """A call that, while it waits for its next try, has the next call fail as well."""
        failing = Failing(1)

        def attempt() -> str:
            if failing.calls and depth:
                nested(depth - 1)
            return failing()

        retry.call(attempt)

    with caplog.at_level(logging.INFO, "engine.storage.retry"):
        nested(7)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "8 tries failed" in caplog.text


def test_storms_that_follow_each_other_are_one(caplog: pytest.LogCaptureFixture) -> None:
    """Where every third request fails, a save would fill the log."""
    time = Time()
    retry = policy(time)
    with caplog.at_level(logging.INFO, "engine.storage.retry"):
        for _ in range(50):
            retry.call(Failing(1))
        assert len(caplog.records) == 2
        time.now += 60.0
        retry.call(Failing(1))
    assert len(caplog.records) == 4


def test_giving_up_at_once_ends_no_storm_of_others(caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    retry = policy(time, attempts=2)
    outer = Failing(1)

    def attempt() -> str:
        if outer.calls:
            with pytest.raises(StorageUnavailableError):
                retry.brief().call(Failing(99))
        return outer()

    with caplog.at_level(logging.INFO, "engine.storage.retry"):
        retry.call(attempt)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_nothing_is_tried_again_once_stopped() -> None:
    time, attempt, stop = Time(), Failing(99), threading.Event()
    stop.set()
    with pytest.raises(StorageUnavailableError):
        policy(time).call(attempt, stop=stop)
    assert (attempt.calls, time.pauses) == (1, [])


def test_tidying_up_gives_up_soon() -> None:
    time, attempt = Time(), Failing(99)
    with pytest.raises(StorageUnavailableError):
        policy(time, cap_secs=100.0).brief().call(attempt)
    assert attempt.calls <= 4
    assert time.now - 100.0 <= 10.0


@pytest.mark.parametrize(
    "bad", [{"attempts": 0}, {"deadline_secs": -1.0}, {"first_secs": 3.0, "cap_secs": 2.0}]
)
def test_impossible_policies(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="tries"):
        policy(Time(), **bad)
