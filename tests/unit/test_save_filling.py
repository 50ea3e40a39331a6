"""Writing follows copying: whoever waits gets exactly what is there, or the copy's error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.save.filling import Filling


def test_what_is_there_is_not_waited_for() -> None:
    filling = Filling()
    filling.wait_until(0)
    filling.advance(100)
    filling.wait_until(100)
    filling.advance(50)
    filling.wait_until(100)


def test_a_waiter_goes_on_when_its_bytes_are_there() -> None:
    filling, waiting = Filling(), threading.Event()
    reached = []

    def write() -> None:
        waiting.set()
        filling.wait_until(10)
        reached.append(1)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(write)
        waiting.wait()
        filling.advance(9)
        assert not future.done()
        assert reached == []
        filling.advance(10)
        future.result(30)


def test_the_devices_copies_are_settled_before_the_writer_goes_on() -> None:
    settled: list[int] = []
    filling = Filling(lambda: settled.append(1))
    filling.advance(5)
    assert settled == []
    filling.wait_until(5)
    assert settled == [1]


@pytest.mark.parametrize("error", [RuntimeError("device lost"), KeyboardInterrupt()], ids=repr)
def test_a_failed_copy_reaches_every_waiter(error: BaseException) -> None:
    filling = Filling()

    def write() -> BaseException | None:
        try:
            filling.wait_until(10)
        except BaseException as caught:
            return caught
        return None

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(write) for _ in range(2)]
        filling.advance(9)
        filling.fail(error)
        assert [future.result(30) for future in futures] == [error, error]
    with pytest.raises(type(error)):
        filling.wait_until(1)  # also what was there already: the snapshot is void
