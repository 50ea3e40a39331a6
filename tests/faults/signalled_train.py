"""`engine.train`, which sends itself SIGTERM in the middle of one phase. For test_preemption.py.

python -m tests.faults.signalled_train PHASE NTH engine.train's flags
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from typing import Any

PHASES = {
    "step": "engine.run.trainer:train_step",
    "eval": "engine.run.trainer:_Loop._evaluate",
    "snapshot": "engine.save.saver:Saver._copy",
    "write": "engine.save.job:write_rank",
    "commit": "engine.checkpointer:commit",
    "retention": "engine.checkpointer:reap",
    "restore": "engine.restore.restorer:Restorer._restore",
}


def arm(phase: str, nth: int) -> None:
    """Have the nth call (from 1) of the phase's function begin with a signal to this process."""
    module_name, _, path = PHASES[phase].partition(":")
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
        return real(*args, **given)

    setattr(owner, name, signalled)


if __name__ == "__main__":
    from engine.train import main

    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
