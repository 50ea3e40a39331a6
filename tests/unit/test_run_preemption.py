"""Signals: the first asks, the same one again does not, a later one insists, and time runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.run import preemption as preemption_module
from engine.run.parent import follow_launcher, orphan_check
from engine.run.preemption import Preemption, Request, Verdict, grace_within

ROOT = Path(__file__).resolve().parents[2]
INT, TERM = int(signal.SIGINT), int(signal.SIGTERM)


@pytest.mark.parametrize(
    ("signals", "verdicts"),
    [
        ([(TERM, 100.0)], ["first"]),
        ([(TERM, 100.0), (TERM, 100.1)], ["first", "same"]),
        ([(INT, 100.0), (TERM, 101.99)], ["first", "same"]),
        ([(INT, 100.0), (TERM, 102.0)], ["first", "leave"]),
        ([(INT, 100.0), (INT, 101.0), (INT, 103.0)], ["first", "same", "leave"]),
    ],
    ids=str,
)
def test_what_a_signal_means(signals: list[tuple[int, float]], verdicts: list[str]) -> None:
    """torchrun delivers a signal twice within 0.1 s; another one is meant from 2 s after the first on."""
    request = Request(grace_secs=25.0)
    assert [request.receive(signum, now) for signum, now in signals] == verdicts
    assert request.signum == signals[0][0], "the first one names the kind"


def test_the_time_that_is_left() -> None:
    request = Request(grace_secs=25.0)
    assert request.secs_left(0.0) is None
    request.receive(TERM, 100.0)
    assert [request.secs_left(now) for now in (100.0, 110.0, 125.0, 900.0)] == [25.0, 15.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("grace", "environ", "expected"),
    [(60.0, {}, 60.0), (60.0, {"TORCHELASTIC_RUN_ID": "x"}, 25.0), (7.0, {"TORCHELASTIC_RUN_ID": "x"}, 7.0)],
)
def test_torchrun_leaves_less_time(grace: float, environ: dict[str, str], expected: float) -> None:
    assert grace_within(grace, environ) == expected


class Told(Request):
    """Lets the test wait until a signal has been taken in."""

    taken = threading.Semaphore(0)

    def receive(self, signum: int, now: float) -> Verdict:
        try:
            return super().receive(signum, now)
        finally:
            self.taken.release()


class Harness:
    """A watching thread on a pipe of its own, a clock that the test moves, and exits that are recorded."""

    def __init__(self, grace_secs: float = 25.0) -> None:
        self.now = 100.0
        self.left: list[tuple[int, str]] = []
        self.request = Told(grace_secs)
        self.preemption = Preemption(
            self.request, leave=lambda code, why: self.left.append((code, why)), clock=lambda: self.now
        )
        read_fd, self.write_fd = os.pipe()
        self.thread = threading.Thread(target=self.preemption.watch, args=(read_fd,), daemon=True)
        self.thread.start()

    def deliver(self, *arrivals: tuple[int, float]) -> None:
        """Deliver signals at given times, each after the one before was taken in."""
        for signum, at in arrivals:
            self.now = at
            os.write(self.write_fd, bytes([signum]))
            if signum in (INT, TERM):
                assert self.request.taken.acquire(timeout=10.0)

    def ends(self) -> None:
        """The watching ends by itself."""
        self.thread.join(10.0)
        assert not self.thread.is_alive()
        os.close(self.write_fd)

    def hang_up(self) -> None:
        os.close(self.write_fd)
        self.thread.join(10.0)
        assert not self.thread.is_alive()


@pytest.fixture
def harness() -> Harness:
    return Harness()


def test_one_signal_sets_the_flag_and_ends_nothing(harness: Harness) -> None:
    assert harness.preemption.signum is None
    harness.deliver((TERM, 100.0), (TERM, 100.1))
    harness.hang_up()
    assert harness.preemption.signum == TERM
    assert harness.left == []


def test_a_second_signal_leaves_at_once(harness: Harness) -> None:
    harness.deliver((INT, 100.0), (TERM, 103.0))
    harness.ends()
    ((code, why),) = harness.left
    assert code == 128 + INT
    assert "second signal" in why


def test_other_signals_mean_nothing(harness: Harness) -> None:
    harness.deliver((int(signal.SIGCHLD), 100.0))
    harness.hang_up()
    assert harness.preemption.signum is None


def test_the_deadline_ends_the_process_whatever_it_is_doing() -> None:
    harness = Harness(grace_secs=0.0)
    harness.deliver((TERM, 100.0))
    harness.ends()
    ((code, why),) = harness.left
    assert code == 128 + TERM
    assert "grace" in why


def test_more_time_once_there_is_something_to_save() -> None:
    preemption = Preemption(Request(5.0))
    preemption.allow(25.0)
    preemption.request.receive(TERM, 100.0)
    assert preemption.request.secs_left(100.0) == 25.0


BLOCKED_IN_C = """
import ctypes, os, signal, sys
from engine.run.preemption import Preemption, Request
preemption = Preemption(Request(float(sys.argv[1])))
preemption.install()
os.kill(os.getpid(), signal.SIGTERM)
ctypes.CDLL(None).sleep(60)
"""


def test_a_main_thread_that_is_stuck_in_c_does_not_stop_the_way_out() -> None:
    """A Python handler alone would wait for the call to return: here the pipe and the thread do the work."""
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED_IN_C, "0.2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert ran.returncode == 128 + TERM
    assert "grace time" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_install_and_uninstall_give_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption(Request(25.0))
    preemption.install()
    try:
        assert signal.getsignal(signal.SIGTERM) is not before
    finally:
        preemption.uninstall()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_without_torchrun_a_process_follows_nobody() -> None:
    assert follow_launcher({}, prctl=lambda option, value: 1 / 0) is False  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("parents", "killed"),
    [([7, 7], False), ([7, 1], True), ([1, 1], False)],
    ids=["lives", "died", "is process 1"],
)
def test_a_launcher_that_died_just_before_is_noticed(parents: list[int], killed: bool) -> None:
    calls: list[tuple[int, int]] = []
    seen = iter(parents)
    asked: list[tuple[int, int]] = []

    def prctl(option: int, value: int) -> int:
        asked.append((option, value))
        return 0

    assert follow_launcher(
        {"TORCHELASTIC_RUN_ID": "x"},
        prctl=prctl,
        parent=lambda: next(seen),
        kill=lambda pid, signum: calls.append((pid, signum)),
    )
    assert asked == [(1, TERM)], "PR_SET_PDEATHSIG is 1"
    assert calls == ([(os.getpid(), TERM)] if killed else [])


@pytest.mark.parametrize(
    ("parents", "line", "expected"),
    [
        ([7, 7, 7], b"", [False, False]),
        ([7, 7, 1], b"", [False, True]),
        ([1, 1, 1], b"/sbin/init", [True, True]),
        ([1, 1, 1], b"/usr/bin/python\0/usr/bin/torchrun", [False, False]),
        ([1, 1, 1], b"torchrun\0--standalone", [False, False]),
    ],
    ids=["alive", "dies later", "was dead before", "is process 1", "is process 1, too"],
)
def test_a_worker_notices_that_its_launcher_is_gone(
    parents: list[int], line: bytes, expected: list[bool]
) -> None:
    turn = iter(parents)
    check = orphan_check(
        {"TORCHELASTIC_RUN_ID": "x"}, parent=lambda: next(turn), command_line=lambda pid: line
    )
    assert [check(), check()] == expected


def test_a_process_without_torchrun_is_no_orphan() -> None:
    assert orphan_check({}, parent=lambda: 1, command_line=lambda pid: b"")() is False


def test_an_orphan_leaves_as_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption_module, "ORPHAN_CHECK_SECS", 0.0)
    now = iter([0.0, 0.0, 100.0, 100.0, 100.0])
    left: list[int] = []
    preemption = Preemption(
        Request(25.0),
        leave=lambda code, sentence: left.append(code),
        clock=lambda: next(now, 200.0),
        orphaned=lambda: True,
    )
    read_fd, write_fd = os.pipe()
    preemption.watch(read_fd)
    os.close(write_fd)
    assert preemption.signum == TERM
    assert left == [128 + TERM]


def test_a_refused_request_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert not follow_launcher({"TORCHELASTIC_RUN_ID": "x"}, prctl=lambda option, value: -1)
    assert "may outlive a killed torchrun" in caplog.text


ORPHAN = """
import os, signal, sys
from engine.run.parent import follow_launcher
child = os.fork()
if child == 0:
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"told"), os._exit(0)))
    follow_launcher()
    os.write(int(sys.argv[1]), b"r")
    signal.pause()
os.read(int(sys.argv[2]), 1)
os._exit(0)
"""


def test_the_kernel_tells_a_worker_when_its_launcher_is_gone() -> None:
    read_fd, write_fd = os.pipe()
    try:
        ran = subprocess.run(
            [sys.executable, "-c", ORPHAN, str(write_fd), str(read_fd)],
            cwd=ROOT,
            pass_fds=(read_fd, write_fd),
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    finally:
        os.close(read_fd)
        os.close(write_fd)
    assert ran.stdout == "told", ran.stderr
