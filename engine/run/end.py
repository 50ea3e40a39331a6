"""How the program ends when its work is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from engine.mirror.uploader import copies_hang
from engine.process_end import end_at_once
from engine.save.at_exit import anything_hangs


def end_process(
    status: int,
    environ: Mapping[str, str] = os.environ,
    *,
    leave_at_once: Callable[[int], None] = end_at_once,
) -> None:
    """End the program; among other ranks, and when a save hangs, without taking the interpreter down.

    A worker thread of gloo lets go of its last tensor at some time after the collective, and takes the GIL
    for it. While the interpreter is taken down that ends the thread in the middle of C++ code, and the
    process with SIGABRT: seen with torch 2.13 in 1 run of 100 on busy cores, in `ProcessGroupGloo::runLoop`
    -> `TensorImpl::decref_pyobject`. Everything that must be finished has been closed by now. Dissolving
    the group does not help, because a wrapped model keeps it alive.
    """
    if "RANK" not in environ and not anything_hangs() and not copies_hang():
        sys.exit(status)
    leave_at_once(status)
