"""The end of the program: flushed, and without taking down an interpreter that gloo's threads still use."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from engine.run.end import end_process

PROGRAM = """
import atexit, sys
from engine.run.end import end_process
atexit.register(print, "the interpreter was taken down")
sys.stdout.write("said ")
sys.stderr.write("warned")
end_process(2)
"""


@pytest.mark.parametrize("ranks", [False, True])
def test_among_ranks_the_interpreter_is_not_taken_down(ranks: bool) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | (
        {"RANK": "0"} if ranks else {}
    )
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr == "warned"
    assert ran.stdout == "said " + ("" if ranks else "the interpreter was taken down\n")


def test_log_handlers_are_flushed_first() -> None:
    said: list[str] = []

    class Held(logging.Handler):
        def flush(self) -> None:
            said.append("flushed")

    handler = Held()
    end_process(0, {"RANK": "1"}, leave_at_once=lambda status: said.append(f"left with {status}"))
    assert said[0] == "flushed"
    assert said[-1] == "left with 0"
    handler.close()
