"""What the save benchmark measures. Times are seconds; those of a save count from the call of `save`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.harness.floors import Floor
from bench.harness.records import Failure


@dataclass(frozen=True, slots=True)
class TrainingWindow:
    """Some training steps with one save at the start, or without any in the row `none`.

    Attributes:
        step_secs: the duration of each step.
        save_secs: within the call of `save`.
        gate_secs: waiting before optimizer steps, where a mode asks that of its caller.
        stream_secs: how long the compute stream stood still for the save, by CUDA events; None on CPU.
        stored_secs: until the mode said that the save was done; None without a save.
        cpu_secs: of the save, on all threads that do not train and in all child processes.
        process_cpu_secs: of everything until the end of the window, including training.
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
        """How long the training thread waited: in `save`, and before optimizer steps."""
        return self.save_secs + self.gate_secs


@dataclass(frozen=True, slots=True)
class IdleSave:
    """One save with training idle.

    Attributes:
        cpu_secs: all that the processes used meanwhile.
        copied_secs: until the device had done all the work that `save` gave it; None on CPU.
    """

    row: str
    repeat: int
    save_secs: float
    stored_secs: float
    cpu_secs: float
    copied_secs: float | None = None
    causes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory of the rank that takes most, in bytes above the trainer that saves nothing.

    Attributes:
        peak_bytes: the highest level while training with saves, above the level before the mode was opened,
            less what training without saves takes above its own level.
        held_bytes: what the mode keeps between saves.
        rank_bytes: what this rank writes per save.
    """

    row: str
    peak_bytes: int
    held_bytes: int
    rank_bytes: int

    @property
    def share(self) -> float:
        """The peak over the bytes that the rank writes."""
        return self.peak_bytes / max(1, self.rank_bytes)


@dataclass(frozen=True, slots=True)
class Growth:
    """Many saves of a small state: how far the memory level rose, and how evenly the ranks wrote.

    Attributes:
        growth_bytes: the level after the last save less that after save number `settled`, of the rank with
            the most.
        written_bytes: per save, by each rank; the state is replicated over them.
    """

    row: str
    saves: int
    settled: int
    state_bytes: int
    growth_bytes: int
    written_bytes: tuple[int, ...]

    @property
    def share(self) -> float:
        """The growth over the size of the state."""
        return self.growth_bytes / self.state_bytes

    @property
    def balance(self) -> float | None:
        """The largest over the mean of the bytes that ranks write; None for one rank."""
        if len(self.written_bytes) < 2 or not sum(self.written_bytes):
            return None
        return max(self.written_bytes) * len(self.written_bytes) / sum(self.written_bytes)


@dataclass(slots=True)
class Measurements:
    """Everything that one run measured."""

    windows: list[TrainingWindow] = field(default_factory=list)
    idle: list[IdleSave] = field(default_factory=list)
    floors: list[Floor] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @classmethod
    def from_json(cls, document: dict[str, list[dict[str, Any]]]) -> Measurements:
        """Rebuild what `dataclasses.asdict` and JSON made of it."""
        kinds = (TrainingWindow, IdleSave, Floor, Memory, Growth, Failure)
        lists: dict[str, Any] = {
            name: [kind(**_with_tuples(record)) for record in document[name]]
            for name, kind in zip(cls.__slots__, kinds, strict=True)
        }
        return cls(**lists)


def _with_tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
