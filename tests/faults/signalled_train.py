"""`engine.train`, which sends itself SIGTERM in the middle of one phase. For test_preemption.py.

python -m tests.faults.signalled_train PHASE NTH engine.train's flags

"flight" and "late" are "write", which goes on only once the loop has found that save in flight; for "late" a
save takes far longer than the time that is left.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
from typing import Any

PHASES = {
    "step": "engine.run.trainer:train_step",
    "eval": "engine.run.trainer:_Loop._evaluate",
    "snapshot": "engine.save.saver:Saver._copy",
    "write": "engine.save.job:write_rank",
    "commit": "engine.save.run_directory:commit",
    "retention": "engine.directory.reaper:_delete_checkpoint",
    "restore": "engine.restore.restorer:Restorer._restore",
}
IN_FLIGHT = ("flight", "late")
HOLD_SECS = 60.0
"""Bounds a test that hangs."""


def arm(phase: str, nth: int) -> None:
    """Have the nth call (from 1) of the phase's function begin with a signal to this process."""
    module_name, _, path = PHASES["write" if phase in IN_FLIGHT else phase].partition(":")
    found = hold(phase) if phase in IN_FLIGHT else None
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), [0]

    @functools.wraps(real)
    def signalled(*args: Any, **given: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            os.kill(os.getpid(), signal.SIGTERM)
            assert found is None or found.wait(HOLD_SECS), "the loop never found the save in flight"
        return real(*args, **given)

    setattr(owner, name, signalled)


def hold(phase: str) -> threading.Event:
    """Set when the loop says that it finishes the save in flight."""
    from engine.run.console import Console
    from engine.run.recorder import Recorder

    found, say = threading.Event(), Console.say

    def listen(console: Console, line: str) -> None:
        say(console, line)
        if ": finishing the save of step" in line:
            found.set()

    Console.say = listen  # type: ignore[method-assign]
    if phase == "late":
        Recorder.usual_save_secs = property(lambda recorder: 1e6)  # type: ignore[method-assign, assignment]
    return found


if __name__ == "__main__":
    from engine.train.session import main

    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
