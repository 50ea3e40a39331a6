"""How much host memory is left: on the machine, and in the control groups that this process is in.

A container's limit is a control group's; whoever exceeds it is killed, whatever the machine has left. See the
kernel's Documentation/admin-guide/cgroup-v2.rst. Limits of version 1 are not looked at.
"""

from __future__ import annotations

from pathlib import Path

NO_LIMIT = 2**63 - 1

_DROPPABLE = ("active_file", "inactive_file")
"""Pages of files count as used by the group, and make room when somebody needs it."""


def available_bytes(root: Path = Path("/")) -> int:
    """Host memory that this process can take without swapping or being killed, as the kernel estimates it.

    `root`: where /proc and /sys are.
    """
    return min(_on_machine(root / "proc/meminfo"), _in_groups(root))


def _on_machine(meminfo: Path) -> int:
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return NO_LIMIT


def _in_groups(root: Path) -> int:
    """The least that is left in this process's control group and those around it."""
    top = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return NO_LIMIT
    names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    left = NO_LIMIT
    for name in names:
        group = top / name
        for one in (group, *group.parents):
            left = min(left, _left_in(one))
            if one == top:
                break
    return left


def _left_in(group: Path) -> int:
    """NO_LIMIT where there is none, or where the group cannot be read."""
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # or "max", which is no number
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return NO_LIMIT
    fields = dict(line.split() for line in stat.splitlines())
    return max(0, limit - used + sum(int(fields.get(name, 0)) for name in _DROPPABLE))
