"""How much host memory is left: on the machine, and in this process's control groups.

A container's limit is a control group's; a process that exceeds it is killed, however much memory the machine
has left. See the kernel's Documentation/admin-guide/cgroup-v2.rst. Limits of cgroup version 1 are ignored.
"""

from __future__ import annotations

from pathlib import Path

NO_LIMIT = 2**63 - 1

_DROPPABLE = ("active_file", "inactive_file")
"""Page cache counts as used memory of the group, but the kernel drops it when memory is needed."""


def available_bytes(root: Path = Path("/")) -> int:
    """Host memory that this process can allocate without swapping or being killed, by the kernel's estimate.

    `root`: the directory that has /proc and /sys.
    """
    return min(_on_machine(root / "proc/meminfo"), _in_groups(root))


def _on_machine(meminfo: Path) -> int:
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return NO_LIMIT


def _in_groups(root: Path) -> int:
    """The least memory left in this process's control group and its parents."""
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
    """NO_LIMIT when the group has none or cannot be read."""
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" is a ValueError
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return NO_LIMIT
    fields = dict(line.split() for line in stat.splitlines())
    return max(0, limit - used + sum(int(fields.get(name, 0)) for name in _DROPPABLE))
