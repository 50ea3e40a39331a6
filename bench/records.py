"""What was measured, as values: one per window, floor or mode; and how ranks' readings become one.

All times are seconds; a save's times count from the call of its `save`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

NONE = "none"
"""The row that saves nothing: what all others are compared with."""
RAW = "raw write"
"""The floor under training time lost: the bytes of a save written beside training, and nothing else done."""


@dataclass(frozen=True, slots=True)
class TrainingWindow:
    """Some training steps with one save at their start, or without for the row `none`.

    Attributes:
        step_secs: duration of each step.
        save_secs: within the call of `save`.
        gate_secs: waiting before the optimizer steps, where a mode asks that of its caller.
        stream_secs: time for which the compute stream stood still for the save, by CUDA events; None on CPU.
        stored_secs: until the mode said that the save was done; None without a save.
        cpu_secs: of the save, over all threads that do not train and all child processes.
        process_cpu_secs: of everything, training included, until the window's end.
        written_bytes: by each rank.
        causes: seconds by cause, where the mode reports them.
    """

    row: str
    repeat: int
    window_secs: float
    step_secs: tuple[float, ...]
    save_secs: float = 0.0
    gate_secs: float = 0.0
    stream_secs: float | None = None
    stored_secs: float | None = None
    cpu_secs: float = 0.0
    process_cpu_secs: float = 0.0
    written_bytes: tuple[int, ...] = ()
    causes: dict[str, float] = field(default_factory=dict)

    @property
    def blocked_secs(self) -> float:
        """What the training thread lost by waiting: in `save`, and before optimizer steps."""
        return self.save_secs + self.gate_secs


@dataclass(frozen=True, slots=True)
class IdleSave:
    """One save with training idle.

    Attributes:
        cpu_secs: all that the processes used meanwhile.
        copied_secs: until the device had done all work that `save` gave it, where the state lies on a CUDA
            device; None on CPU.
    """

    row: str
    repeat: int
    save_secs: float
    stored_secs: float
    cpu_secs: float
    copied_secs: float | None = None
    causes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Floor:
    """One pass of "copy" (into a warm buffer) or "write" (O_DIRECT and fsync) over the save's bytes."""

    name: str
    repeat: int
    secs: float
    rank_bytes: int
    method: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory of the rank that takes most, in bytes above the trainer that saves nothing.

    Attributes:
        peak_bytes: highest level while training with saves, above the one before the mode was opened, less
            what training without saves takes above its own.
        held_bytes: what the mode keeps between saves.
        rank_bytes: bytes that this rank writes per save.
    """

    row: str
    peak_bytes: int
    held_bytes: int
    rank_bytes: int


@dataclass(frozen=True, slots=True)
class Growth:
    """Many saves of a small state: by how much the memory level rose, and how evenly ranks wrote.

    Attributes:
        growth_bytes: level after the last save minus that after the `settled`-th, of the rank with most.
        written_bytes: per save, by each rank; the state is replicated over them.
    """

    row: str
    saves: int
    settled: int
    state_bytes: int
    growth_bytes: int
    written_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A mode that could not run, or broke down on the way: from then on it was left out."""

    row: str
    stage: str
    error: str


@dataclass(slots=True)
class Measurements:
    """Everything that one run measured."""

    windows: list[TrainingWindow] = field(default_factory=list)
    idle: list[IdleSave] = field(default_factory=list)
    floors: list[Floor] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """The records as JSON objects, by kind."""
        return {name: [asdict(record) for record in getattr(self, name)] for name in self.__slots__}

    @classmethod
    def from_json(cls, document: dict[str, list[dict[str, Any]]]) -> Measurements:
        """Rebuild what `to_json` returned."""
        return cls(**{name: [kind(**_tuples(r)) for r in document[name]] for name, kind in _KINDS.items()})


_KINDS: dict[str, Callable[..., Any]] = {
    "windows": TrainingWindow,
    "idle": IdleSave,
    "floors": Floor,
    "memory": Memory,
    "growth": Growth,
    "failures": Failure,
}


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def merge_windows(ranks: Sequence[TrainingWindow]) -> TrainingWindow:
    """One window as its ranks saw it: the slowest rank's times, everybody's CPU and bytes."""
    first = ranks[0]
    return TrainingWindow(
        row=first.row,
        repeat=first.repeat,
        window_secs=max(one.window_secs for one in ranks),
        step_secs=tuple(max(secs) for secs in zip(*(one.step_secs for one in ranks), strict=True)),
        save_secs=max(one.save_secs for one in ranks),
        gate_secs=max(one.gate_secs for one in ranks),
        stream_secs=_largest([one.stream_secs for one in ranks]),
        stored_secs=_largest([one.stored_secs for one in ranks]),
        cpu_secs=sum(one.cpu_secs for one in ranks),
        process_cpu_secs=sum(one.process_cpu_secs for one in ranks),
        written_bytes=tuple(count for one in ranks for count in one.written_bytes),
        causes=first.causes,
    )


def merge_idle(ranks: Sequence[IdleSave]) -> IdleSave:
    """One idle save as its ranks saw it."""
    return IdleSave(
        row=ranks[0].row,
        repeat=ranks[0].repeat,
        save_secs=max(one.save_secs for one in ranks),
        stored_secs=max(one.stored_secs for one in ranks),
        cpu_secs=sum(one.cpu_secs for one in ranks),
        copied_secs=_largest([one.copied_secs for one in ranks]),
        causes=ranks[0].causes,
    )


def merge_growth(ranks: Sequence[Growth]) -> Growth:
    """Growth of the rank that grew most, and the bytes of all."""
    first = ranks[0]
    return Growth(
        row=first.row,
        saves=first.saves,
        settled=first.settled,
        state_bytes=first.state_bytes,
        growth_bytes=max(one.growth_bytes for one in ranks),
        written_bytes=tuple(count for one in ranks for count in one.written_bytes),
    )


def slowest_floor(ranks: Sequence[Floor]) -> Floor:
    """Ranks run a floor together: it is over when the last is through."""
    return max(ranks, key=lambda one: one.secs)


def hungriest(ranks: Sequence[Memory]) -> Memory:
    """The rank that takes most memory for what it writes."""
    return max(ranks, key=lambda one: one.peak_bytes / max(1, one.rank_bytes))


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
