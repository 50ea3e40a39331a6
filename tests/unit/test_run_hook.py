"""--on_event: each event to the command, and nothing of the command to the training."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import threading
from pathlib import Path

import pytest

from engine.run.hook import EventHook, run_command


class Command:
    """Takes lines like the command would; waits at a gate while it is closed."""

    def __init__(self, *, open_: bool = True) -> None:
        self.seen: list[int] = []
        self.reached = threading.Semaphore(0)
        self.gate = threading.Event()
        if open_:
            self.gate.set()

    def __call__(self, command: str, line: bytes) -> None:
        self.reached.release()
        assert self.gate.wait(10.0)
        assert command == "cmd"
        self.seen.append(json.loads(line)["n"])


def test_events_arrive_in_order_and_closing_waits_for_them() -> None:
    command = Command()
    hook = EventHook("cmd", run=command)
    for n in range(5):
        hook.submit({"n": n})
    assert hook.close(10.0)
    assert command.seen == [0, 1, 2, 3, 4]


def test_a_slow_command_costs_events_not_time(caplog: pytest.LogCaptureFixture) -> None:
    command = Command(open_=False)
    hook = EventHook("cmd", run=command, capacity=2)
    hook.submit({"n": 0})
    assert command.reached.acquire(timeout=10.0)
    for n in (1, 2, 3, 4):
        hook.submit({"n": n})
    command.gate.set()
    assert not hook.close(10.0)
    assert command.seen == [0, 1, 2]
    assert caplog.text.count("some events are dropped") == 1


@pytest.mark.parametrize("queued", [1, 3], ids=["one hangs", "the queue is full"])
def test_a_command_that_hangs_does_not_hold_up_the_end(queued: int, caplog: pytest.LogCaptureFixture) -> None:
    command = Command(open_=False)
    hook = EventHook("cmd", run=command, capacity=2)
    hook.submit({"n": 0})
    assert command.reached.acquire(timeout=10.0)
    for n in range(1, queued):
        hook.submit({"n": n})
    assert not hook.close(0.01)
    assert "did not finish in time" in caplog.text
    command.gate.set()


def test_after_closing_nothing_is_taken() -> None:
    command = Command()
    hook = EventHook("cmd", run=command)
    assert hook.close(10.0)
    hook.submit({"n": 1})
    assert command.seen == []


def test_a_runner_that_raises_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[bytes] = []

    def run(command: str, line: bytes) -> None:
        seen.append(line)
        raise RuntimeError("boom")

    hook = EventHook("cmd", run=run)
    hook.submit({"n": 1})
    hook.submit({"n": 2})
    assert hook.close(10.0)
    assert len(seen) == 2
    assert "boom" in caplog.text


def test_the_command_gets_the_line_on_standard_input(tmp_path: Path) -> None:
    run_command(f"cat > '{tmp_path}/in'", b'{"event":"eval"}\n')
    assert (tmp_path / "in").read_bytes() == b'{"event":"eval"}\n'


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo nobody home >&2; exit 3", "exited with 3: nobody home"),
        ("exit 4", "exited with 4: nothing on standard error"),
        ("/no/such/program", "exited with 127"),
    ],
)
def test_a_failing_command_is_logged(command: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    run_command(command, b"{}\n")
    assert said in caplog.text


def test_a_command_that_ignores_its_input_is_fine(caplog: pytest.LogCaptureFixture) -> None:
    run_command("true", b"x" * 1_000_000)
    assert caplog.text == ""


def test_a_command_that_takes_too_long_is_killed_with_its_children(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_command(f"sleep 60 & echo $! > {tmp_path}/pid; wait", b"", timeout_secs=0.3)
    assert "was killed" in caplog.text
    with contextlib.suppress(ProcessLookupError):  # gone already
        ended = os.pidfd_open(int((tmp_path / "pid").read_text()))
        assert select.select([ended], [], [], 30.0)[0], "it lives on"
        os.close(ended)


def test_after_the_kill_nobody_waits_for_an_open_pipe(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A child that has left the session keeps standard error open for as long as it lives."""

    def times_out(process: object, line: bytes, timeout: float | None = None) -> None:
        assert timeout is not None, "this would wait for it"
        raise subprocess.TimeoutExpired("cmd", timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", times_out)
    run_command("sleep 60", b"{}\n")
    assert "was killed" in caplog.text


def test_closing_has_one_deadline_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room in a full queue may come late: what is left then is all that the command gets."""
    now = [100.0]
    hook = EventHook("cmd", run=Command(), clock=lambda: now[0])
    joined: list[float] = []

    class Serving:
        def join(self, secs: float) -> None:
            joined.append(secs)

        def is_alive(self) -> bool:
            return False

    real = hook._queue.put

    def slow(item: bytes | None, timeout: float) -> None:
        now[0] += 7.0
        real(item, timeout=timeout)

    monkeypatch.setattr(hook._queue, "put", slow)
    monkeypatch.setattr(hook, "_thread", Serving())
    assert hook.close(10.0)
    assert joined == [3.0]
