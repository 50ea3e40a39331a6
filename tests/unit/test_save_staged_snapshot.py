"""Writing follows copying: a waiting thread gets exactly the bytes that are there, or the copy's error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.save.staged_snapshot import StagedSnapshot


def test_what_is_there_is_not_waited_for() -> None:
    staged = StagedSnapshot()
    staged.wait_until(0)
    staged.advance(100)
    staged.wait_until(100)
    staged.advance(50)
    staged.wait_until(100)


def test_a_waiter_goes_on_when_its_bytes_are_there() -> None:
    staged, waiting = StagedSnapshot(), threading.Event()
    reached = []

    def write() -> None:
        waiting.set()
        staged.wait_until(10)
        reached.append(1)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(write)
        waiting.wait()
        staged.advance(9)
        assert not future.done()
        assert reached == []
        staged.advance(10)
        future.result(30)


def test_the_devices_copies_are_settled_before_the_writer_goes_on() -> None:
    settled: list[int] = []
    staged = StagedSnapshot(settle=lambda: settled.append(1))
    staged.advance(5)
    assert settled == []
    staged.wait_until(5)
    assert settled == [1]


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=repr)
def test_a_failed_copy_reaches_every_waiter(error: BaseException) -> None:
    staged = StagedSnapshot()

    def write() -> BaseException | None:
        try:
            staged.wait_until(10)
        except BaseException as caught:
            return caught
        return None

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(write) for _ in range(2)]
        staged.advance(9)
        staged.fail(error)
        assert [future.result(30) for future in futures] == [error, error]
    with pytest.raises(type(error)):
        staged.wait_until(1)  # also what was there already: the snapshot is void
