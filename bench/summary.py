"""From measurements to the figures of the tables: medians, spreads, ratios. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.records import NONE, RAW, Growth, Measurements, Memory, TrainingWindow


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of some samples. With the few repeats of a run nothing finer is honest."""

    middle: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None without values."""
        known = list(values)
        return cls(median(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True, slots=True)
class RowSummary:
    """One line of the tables. None where nothing was measured.

    Attributes:
        lost: training seconds lost per save.
        inflation: how much longer steps took while the save was in flight: 0.5 is half as long again.
        blocked: seconds in `save` and waiting before optimizer steps.
        stream: seconds for which the compute stream stood still in a window; CUDA only.
        stored_training, stored_idle: seconds from `save` to stored.
        cpu: CPU seconds of the save itself, less what the waiting threads and processes of all modes use in
            as long a time without a save; cpu_idle: of everything during an idle save.
        cpu_window: CPU seconds of the whole window beyond those of as many steps without a save.
        copied_idle: seconds until the device had copied everything, training idle; CUDA only.
    """

    name: str
    lost: Spread | None
    inflation: Spread | None
    blocked: Spread | None
    stream: Spread | None
    stored_training: Spread | None
    stored_idle: Spread | None
    cpu: Spread | None
    cpu_idle: Spread | None
    cpu_window: Spread | None
    copied_idle: Spread | None
    memory: Memory | None
    growth: Growth | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All rows, and what they are held against."""

    rows: dict[str, RowSummary]
    step: Spread | None
    """Seconds of a step without a save."""
    none_stream: Spread | None
    """What the events on the compute stream show without a save: their noise."""
    copy_floor: Spread | None
    write_floor: Spread | None
    write_method: str
    raw_lost: Spread | None = None
    """Training seconds lost where the same bytes are written raw, and nothing is copied or digested."""


def summarise(measured: Measurements, rows: Sequence[str]) -> Summary:
    """Bring measurements into figures, for these rows in this order."""
    steps = none_steps(measured.windows)
    cpu, beside = none_cpu(measured.windows), none_beside(measured.windows)
    nones = [window for window in measured.windows if window.row == NONE]
    write = [floor for floor in measured.floors if floor.name == "write"]
    return Summary(
        rows={name: _row(name, measured, steps, cpu, beside) for name in rows},
        step=Spread.of(secs for window in nones for secs in window.step_secs),
        none_stream=Spread.of(window.stream_secs for window in nones if window.stream_secs is not None),
        copy_floor=Spread.of(floor.secs for floor in measured.floors if floor.name == "copy"),
        write_floor=Spread.of(floor.secs for floor in write),
        write_method=write[0].method if write else "",
        raw_lost=Spread.of(
            lost_secs(window, steps[window.repeat])
            for window in measured.windows
            if window.row == RAW and window.repeat in steps
        ),
    )


def _row(
    name: str,
    measured: Measurements,
    steps: dict[int, float],
    cpu: dict[int, float],
    beside: dict[int, float],
) -> RowSummary:
    windows = [window for window in measured.windows if window.row == name and window.repeat in steps]
    idle = [save for save in measured.idle if save.row == name]
    memory = [one for one in measured.memory if one.row == name]
    growth = [one for one in measured.growth if one.row == name]

    def of(figure: Callable[[TrainingWindow], float | None]) -> Spread | None:
        return Spread.of(value for value in map(figure, windows) if value is not None)

    return RowSummary(
        name=name,
        lost=of(lambda window: lost_secs(window, steps[window.repeat])),
        inflation=of(lambda window: inflation(window, steps[window.repeat])),
        blocked=of(lambda window: window.blocked_secs),
        stream=of(lambda window: window.stream_secs),
        stored_training=of(lambda window: window.stored_secs),
        stored_idle=Spread.of(save.stored_secs for save in idle),
        cpu=of(lambda window: max(0.0, window.cpu_secs - beside[window.repeat] * len(window.step_secs))),
        cpu_idle=Spread.of(save.cpu_secs for save in idle),
        cpu_window=of(lambda window: window.process_cpu_secs - len(window.step_secs) * cpu[window.repeat]),
        copied_idle=Spread.of(save.copied_secs for save in idle if save.copied_secs is not None),
        memory=memory[0] if memory else None,
        growth=growth[0] if growth else None,
    )


def none_steps(windows: Iterable[TrainingWindow]) -> dict[int, float]:
    """By repeat: seconds per step of the windows without a save, their mean."""
    return _by_repeat(windows, lambda window: window.window_secs)


def none_cpu(windows: Iterable[TrainingWindow]) -> dict[int, float]:
    """By repeat: CPU seconds per step without a save."""
    return _by_repeat(windows, lambda window: window.process_cpu_secs)


def none_beside(windows: Iterable[TrainingWindow]) -> dict[int, float]:
    """By repeat: CPU seconds per step without a save of what does not train: the modes' idle threads and
    processes, which are open all the time."""
    return _by_repeat(windows, lambda window: window.cpu_secs)


def _by_repeat(
    windows: Iterable[TrainingWindow], figure: Callable[[TrainingWindow], float]
) -> dict[int, float]:
    sums: dict[int, tuple[float, int]] = {}
    for window in windows:
        if window.row == NONE:
            total, steps = sums.get(window.repeat, (0.0, 0))
            sums[window.repeat] = (total + figure(window), steps + len(window.step_secs))
    return {repeat: total / steps for repeat, (total, steps) in sums.items()}


def lost_secs(window: TrainingWindow, step_secs: float) -> float:
    """What a window took beyond as many steps without a save; noise can make it negative."""
    return window.window_secs - len(window.step_secs) * step_secs


def inflation(window: TrainingWindow, step_secs: float) -> float | None:
    """How much longer the steps took that began while the save was in flight; None if there was none."""
    if window.stored_secs is None:
        return None
    begin, taken = window.save_secs, []
    for secs in window.step_secs:
        if begin >= window.stored_secs:
            break
        taken.append(secs)
        begin += secs
    return sum(taken) / len(taken) / step_secs - 1 if taken else None


def ratio(part: Spread | None, whole: Spread | None) -> float | None:
    """Ratio of two medians of one run."""
    return part.middle / whole.middle if part and whole and whole.middle > 0 else None


def balance(growth: Growth | None) -> float | None:
    """Largest over mean of the bytes that ranks write of replicated state; None for one rank."""
    if growth is None or len(growth.written_bytes) < 2 or not sum(growth.written_bytes):
        return None
    return max(growth.written_bytes) * len(growth.written_bytes) / sum(growth.written_bytes)


def growth_share(growth: Growth) -> float:
    """Growth of memory over the saves, as a share of the state that was saved."""
    return growth.growth_bytes / growth.state_bytes
