"""Which process this is, and whether another one on the same machine is alive."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

_STATE_FIELD = 3
_START_TIME_FIELD = 22
_DEAD_STATES = ("Z", "X")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Identifies a process uniquely. A pid alone is reused by later processes."""

    host: str
    """For messages only."""
    pid: int
    start_time: int
    """When it started, in clock ticks after boot: field 22 of /proc/<pid>/stat."""
    boot_id: str
    pid_namespace: str
    """The target of /proc/<pid>/ns/pid. Pids of another namespace (a container) mean nothing here."""

    @classmethod
    def current(cls) -> ProcessIdentity:
        """The calling process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            start_time=_stat("self")[1],
            boot_id=_read("/proc/sys/kernel/random/boot_id").strip(),
            pid_namespace=os.readlink("/proc/self/ns/pid"),
        )

    def shares_pids_with(self, other: ProcessIdentity) -> bool:
        """Whether the other's pid can be looked up from here: the same boot and the same pid namespace."""
        return (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)


def is_alive(process: ProcessIdentity) -> bool | None:
    """Whether a process of our own boot and pid namespace is alive; None if /proc does not tell.

    A zombie counts as dead: it writes nothing more, and in a container without an init it stays for ever.
    """
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists and belongs to another user
    try:
        state, start_time = _stat(str(process.pid))
    except FileNotFoundError:
        return None  # it ended since, or is hidden from us (hidepid)
    return start_time == process.start_time and state not in _DEAD_STATES


def _stat(pid: str) -> tuple[str, int]:
    """(state, start time). Field 2, the command's name, may contain spaces and brackets: count after it."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[_STATE_FIELD - 3], int(fields[_START_TIME_FIELD - 3])


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()
