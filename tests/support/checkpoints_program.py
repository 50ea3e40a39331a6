"""engine.checkpoints as its user meets it: arguments in; exit code, output and errors out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from engine.checkpoints.__main__ import main


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
