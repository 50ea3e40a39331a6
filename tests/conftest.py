"""For all tests and the processes that they start."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from tests.faults import record

# torch looks up the name behind the address of every store connection. Where the name server now and then
# drops a request, each of these costs the resolver's 5 s; nothing here depends on the answer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# A job that a shell put into the background inherits SIGINT ignored, and so would every program started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
