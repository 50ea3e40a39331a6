"""engine.checkpoints as its user meets it: arguments in; exit code, output and errors out."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.dispatch import main

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Ran:
    """How one call ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, *parts: str) -> None:
        """Bad input: exit code 2, nothing on stdout, one sentence on stderr, and no traceback."""
        assert (self.code, self.out) == (2, "")
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1, self.err
        for part in parts:
            assert part in self.err


class Program:
    """Runs it in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: object) -> Ran:
        self._capsys.readouterr()
        code = main([str(argument) for argument in argv])
        captured = self._capsys.readouterr()
        return Ran(code, captured.out, captured.err)


@contextmanager
def program(capsys: pytest.CaptureFixture[str]) -> Iterator[Program]:
    """The program; afterwards the logger that it sets up is as it was."""
    logger = logging.getLogger("engine")
    before = (logger.handlers, logger.level)
    yield Program(capsys)
    logger.handlers, logger.level = before


def shown_on_a_terminal(*argv: object) -> bytes:
    """Run it as a process that ends well; what it writes to standard error, which is a terminal."""
    terminal, end = os.openpty()
    command = [sys.executable, "-m", "engine.checkpoints", *map(str, argv)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=end) as child:
        os.close(end)
        shown = b""
        while True:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
        assert child.wait(120) == 0
    os.close(terminal)
    return shown
