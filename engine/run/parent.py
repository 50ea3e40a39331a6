"""No worker outlives its launcher.

torchrun starts workers in sessions of their own, so killing its process group misses them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_launcher(
    environ: Mapping[str, str] = os.environ,
    *,
    prctl: Callable[[int, int], int] | None = None,
    parent: Callable[[], int] = os.getppid,
    kill: Callable[[int, int], None] = os.kill,
) -> bool:
    """Under torchrun, ask the kernel for SIGTERM when the launcher dies; returns whether it was asked.

    The launcher may die just before the request: the parent is then another one afterwards, and the signal is
    sent here. Its number alone would not tell, since in a container the launcher itself can be process 1.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return False
    before = parent()
    if (prctl or _prctl)(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        log.warning("prctl(PR_SET_PDEATHSIG) was refused: this worker may outlive torchrun if that is killed")
        return False
    if parent() != before:
        kill(os.getpid(), signal.SIGTERM)
    return True


def orphan_check(
    environ: Mapping[str, str] = os.environ,
    *,
    parent: Callable[[], int] = os.getppid,
    command_line: Callable[[int], bytes] | None = None,
) -> Callable[[], bool]:
    """A check, to be asked now and then, whether torchrun is gone. Never true without torchrun.

    The kernel's signal can be missed: torchrun may die while a worker's interpreter still starts, before the
    signal was asked for. The parent is init by then, and stays it. A launcher names Python or torchrun in its
    command line, also where it is process 1 of a container.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return lambda: False
    first = parent()
    line = (command_line or _command_line)(first)
    launched = first != 1 or b"python" in line or b"torchrun" in line
    return lambda: not launched or parent() != first


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _prctl(option: int, value: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.prctl(option, value, 0, 0, 0))
