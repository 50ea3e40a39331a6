"""The contents of a lease file, and the decision whether its holder is alive. Pure."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from engine.errors import DamagedError
from engine.format.json import canonical_bytes, parse_canonical
from engine.lease.process import ProcessIdentity

MAX_LEASE_BYTES = 64 << 10

_UNKNOWN_PROCESS = ProcessIdentity(host="an unknown host", pid=0, start_time=0, boot_id="", pid_namespace="")


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """The contents of `lease-<epoch>`."""

    epoch: int
    process: ProcessIdentity
    run_id: str
    heartbeat: int
    """Incremented for as long as the holder lives."""
    heartbeat_at: float
    """Unix time of the last heartbeat, by the holder's clock. For messages only: clocks differ."""
    released: bool

    def to_bytes(self) -> bytes:
        """Canonical JSON. The epoch is the file's name."""
        value = asdict(self)
        del value["epoch"]
        return canonical_bytes({**value.pop("process"), **value})

    @classmethod
    def from_bytes(cls, raw: bytes, epoch: int, *, what: str) -> LeaseInfo:
        """Read what `to_bytes` wrote. DamagedError for anything else."""
        value = parse_canonical(raw, what=what, max_bytes=len(raw))
        process = {field.name: _field(value, field.name, what) for field in fields(ProcessIdentity)}
        return cls(
            epoch=epoch,
            process=ProcessIdentity(**process),
            run_id=_field(value, "run_id", what),
            heartbeat=_field(value, "heartbeat", what),
            heartbeat_at=float(_field(value, "heartbeat_at", what)),
            released=_field(value, "released", what),
        )

    @classmethod
    def unreadable(cls, epoch: int) -> LeaseInfo:
        """In place of a lease file that cannot be parsed: held by an unknown run without a heartbeat."""
        return cls(epoch, _UNKNOWN_PROCESS, "unknown", heartbeat=0, heartbeat_at=0.0, released=False)

    def next_heartbeat(self, now: float) -> LeaseInfo:
        """The same lease, one heartbeat later."""
        return replace(self, heartbeat=self.heartbeat + 1, heartbeat_at=now)

    def as_released(self) -> LeaseInfo:
        """The same lease, released."""
        return replace(self, released=True)

    def same_holder(self, other: LeaseInfo) -> bool:
        """Whether both are the same process holding the same epoch."""
        return (self.epoch, self.process, self.run_id) == (other.epoch, other.process, other.run_id)

    def describe(self) -> str:
        """The holder in words."""
        return f"run {self.run_id}, process {self.process.pid} on {self.process.host}"


_TYPES: dict[str, type] = {
    "host": str,
    "pid": int,
    "start_time": int,
    "boot_id": str,
    "pid_namespace": str,
    "run_id": str,
    "heartbeat": int,
    "heartbeat_at": float,
    "released": bool,
}


def _field(value: object, name: str, what: str) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if type(found) is not _TYPES[name]:
        raise DamagedError(f"{what} is not a lease: {name} is missing or not a {_TYPES[name].__name__}")
    return found


class Verdict(enum.Enum):
    """Whether a directory is held, judging by its newest lease."""

    FREE = "released by its holder, or the holder is dead"
    LIVE = "held by a live run"
    UNKNOWN = "no heartbeat seen yet: wait and look again"


def judge(
    top: LeaseInfo,
    me: ProcessIdentity,
    alive: Callable[[ProcessIdentity], bool | None],
    unchanged_secs: float,
    has_changed: bool,
    stale_secs: float,
) -> Verdict:
    """Judge the newest lease, `top`.

    `alive` looks up a process of our own boot and pid namespace; None means unknown. Then, and for all other
    processes, the heartbeat decides: whether it has changed since we began to watch (`has_changed`), and how
    long ago (`unchanged_secs`).
    """
    if top.released:
        return Verdict.FREE
    if me.shares_pids_with(top.process):
        lives = alive(top.process)
        if lives is not None:
            return Verdict.LIVE if lives else Verdict.FREE
    if has_changed:
        return Verdict.LIVE
    return Verdict.FREE if unchanged_secs >= stale_secs else Verdict.UNKNOWN
