"""Sources of a file: windows that cover it in order, buffers that go round, few windows out at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.errors import DamagedError
from engine.storage.local import LocalStorage
from engine.storage.parallel_send import send_windows
from engine.storage.reader_source import Buffers, ReaderSource
from engine.storage.source import BufferSource, Window, in_order
from tests.storage.buffers import PAGE, padded, pattern


def windows(count: int) -> list[Window]:
    return [Window(at, at + 1, memoryview(b"x")) for at in range(count)]


def test_memory_is_not_copied() -> None:
    memory = padded(pattern(10_000))
    for window in BufferSource(memory, 10_000).windows(PAGE):
        assert window.view.obj is memory.obj
        assert window.memory[:PAGE].tobytes() == memory[window.begin : window.begin + PAGE].tobytes()
        assert len(window.view) == window.end - window.begin


def test_an_empty_file_has_no_windows() -> None:
    assert list(in_order(BufferSource(memoryview(b"")), PAGE)) == []


@pytest.mark.parametrize("read_bytes", [0, 3 * PAGE, 100 * PAGE])
def test_a_file_comes_window_by_window(tmp_path: Path, read_bytes: int) -> None:
    data = pattern(10 * PAGE + 5)
    (tmp_path / "file").write_bytes(data)
    seen, found = [], []
    with LocalStorage(tmp_path).open_reader("file") as reader:
        source = ReaderSource(
            reader, lambda begin, view: seen.append((begin, bytes(view))), read_bytes=read_bytes
        )
        for window in in_order(source, PAGE):
            found.append(bytes(window.view))
            window.release()
    assert b"".join(found) == b"".join(view for _, view in seen) == data
    assert [begin for begin, _ in seen] == list(range(0, len(data), max(PAGE, read_bytes)))


def test_nothing_of_a_piece_is_given_before_it_was_checked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pattern(4 * PAGE))

    def check(begin: int, view: memoryview) -> None:
        if begin == 2 * PAGE:
            raise DamagedError("mine")

    with LocalStorage(tmp_path).open_reader("file") as reader:
        given = []
        with pytest.raises(DamagedError, match="mine"):
            given += [
                window.begin for window in ReaderSource(reader, check).windows(PAGE) if not given.append(0)
            ]
    assert len(given) == 2


def test_a_file_that_becomes_shorter_is_damage_and_no_signal(tmp_path: Path) -> None:
    """Mapped, it would end the process."""
    (tmp_path / "file").write_bytes(pattern(64 * PAGE))
    with LocalStorage(tmp_path).open_reader("file") as reader:
        parts = ReaderSource(reader, lambda begin, view: None).windows(16 * PAGE)
        next(parts)
        with open(tmp_path / "file", "r+b") as file:
            file.truncate(20 * PAGE)
        with pytest.raises(DamagedError, match="truncated"):
            next(parts)


def test_a_buffer_comes_back_with_the_last_of_its_windows() -> None:
    buffers = Buffers(PAGE)
    first, release = buffers.take(2)
    release()
    second, _ = buffers.take()
    assert second is not first
    release()
    third, _ = buffers.take()
    assert third is first


def test_results_come_in_the_order_of_the_windows() -> None:
    second_done = threading.Event()

    def send(window: Window) -> int:
        if window.begin == 0:
            assert second_done.wait(30)
        second_done.set()
        return window.begin

    assert send_windows(windows(5), send, 2, thread_name="test") == [0, 1, 2, 3, 4]


def test_after_an_error_nothing_more_is_pulled_or_sent() -> None:
    pulled, sent, stop = [], [], threading.Event()

    def pull() -> list[Window]:
        for window in windows(9):
            pulled.append(window.begin)
            yield window

    def send(window: Window) -> None:
        sent.append(window.begin)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        send_windows(pull(), send, 1, thread_name="test", stop=stop)
    assert stop.is_set()
    assert len(pulled) <= 2
    assert sent == [0]
