"""Makes sure that no worker outlives its launcher.

torchrun starts each worker in its own session, so killing its process group misses them.
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
    """Under torchrun, ask the kernel to send SIGTERM when the launcher dies; returns whether it will.

    If the launcher dies just before the request, the parent has changed, and this function sends the signal.
    Checking for parent 1 would not do: in a container the launcher itself can be process 1.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return False
    before = parent()
    if (prctl or _prctl)(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        log.warning("prctl(PR_SET_PDEATHSIG) failed: this worker may outlive a killed torchrun")
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
    """Returns a function that tells whether torchrun is gone; call it from time to time.

    The kernel's signal can be missed: torchrun may die while the worker's interpreter starts, before
    `follow_launcher` runs. From then on the parent is init. A launcher has Python or torchrun in its command
    line, even as process 1 of a container. Without torchrun the function always returns False.
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
