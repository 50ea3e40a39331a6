"""The end of the program: flushed, and without taking down an interpreter that gloo's threads still use."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest

from engine.mirror.uploader import THREAD_NAME
from engine.save.unclosed import exit_without
from engine.train.session import end_process

PROGRAM = """
import atexit, sys
from engine.train.session import end_process
atexit.register(print, "the interpreter was taken down")
sys.stdout.write("said ")
sys.stderr.write("warned")
end_process(2)
"""


@pytest.mark.parametrize("ranks", [False, True])
def test_among_ranks_the_interpreter_is_not_taken_down(ranks: bool) -> None:
    unset = ("RANK", "PYTHONUNBUFFERED")  # unbuffered, nothing would be left to flush
    env = {name: value for name, value in os.environ.items() if name not in unset} | (
        {"RANK": "0"} if ranks else {}
    )
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr == "warned"
    assert ran.stdout == "said " + ("" if ranks else "the interpreter was taken down\n")


def test_log_handlers_are_flushed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Held(logging.Handler):
        def flush(self) -> None:
            said.append("flushed")

    handler = Held()
    monkeypatch.setattr("os._exit", lambda status: said.append(f"left with {status}"))
    end_process(0, {"RANK": "1"})
    assert said[0] == "flushed"
    assert said[-1] == "left with 0"
    handler.close()


@pytest.mark.parametrize("hangs", ["save", "copy"])
def test_what_hangs_does_not_keep_the_process_nor_its_exit_code(hangs: str) -> None:
    """Taking the interpreter down would wait for a save's thread, and break a copy's off in mid-call."""
    release = threading.Event()
    name = THREAD_NAME if hangs == "copy" else "holdfast-save-7"
    thread = threading.Thread(target=release.wait, name=name, daemon=True)
    thread.start()
    if hangs == "save":
        exit_without(thread)
    left: list[int] = []
    try:
        end_process(3, {}, leave_at_once=left.append)
    finally:
        release.set()
        thread.join()
    assert left == [3]
    with pytest.raises(SystemExit) as ended:
        end_process(3, {}, leave_at_once=left.append)
    assert ended.value.code == 3
    assert left == [3], "nothing hangs any more"
