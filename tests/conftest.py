"""For all tests and the processes that they start."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.faults import record

# No test asserts on wall-clock time: on a busy machine an example may take long.
settings.register_profile("holdfast", deadline=None)
settings.load_profile("holdfast")

# torch looks up the name behind the address of every store connection. Where the name server now and then
# drops a request, each of these costs the resolver's 5 s; nothing here depends on the answer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# A job that a shell put into the background inherits SIGINT ignored, and so would every program started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_lease_is_left() -> Iterator[None]:
    """A lease that a test forgets beats on in its thread, and disturbs tests that count threads later."""
    before = set(threading.enumerate())
    yield
    left = [one for one in set(threading.enumerate()) - before if one.name == "holdfast-lease"]
    for thread in left:
        thread.join(5.0)
    assert not any(thread.is_alive() for thread in left), "this test has left a lease behind"


@pytest.fixture
def nothing_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody copies checkpoints into the directory: an attempt without an owner was left behind, at once."""
    monkeypatch.setattr("engine.lease.arrivals.QUIET_SECS", 0.0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["covered"] = dict(record.counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    record.counts.update(getattr(node, "workeroutput", {}).get("covered", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in record.lines():
        terminalreporter.write_line(line)
    record.write_if_asked()
