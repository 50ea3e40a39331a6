"""Child processes that serve: found dead early, stopped at the end, and never left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_SECS = 60.0
"""Bounds a wait that ends by itself in a few seconds."""

_PR_SET_PDEATHSIG = 1


class ServiceError(RuntimeError):
    """A service did not start; the message ends with what it said."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def plain_environment() -> dict[str, str]:
    """Ours without what is meant for this Python: some of Ceph's tools are scripts of the system's."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }


class Daemon:
    """A program that runs in the foreground, as a child of this process; it dies with it."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=plain_environment(),
                preexec_fn=_die_with_parent,
            )

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until `ready()`; ServiceError when the daemon ends or START_SECS pass before."""
        deadline = time.monotonic() + START_SECS
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.log.read_text(errors="replace")[-1000:] if self.log.exists() else ""
                raise ServiceError(f"{what} did not start ({' '.join(self.command)}): {said}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
