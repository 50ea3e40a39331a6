"""From measurements to the figures of the tables: medians, spreads, ratios. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.cases.modes.raw import RAW
from bench.cases.modes.registry import NONE
from bench.cases.save.records import Growth, Measurements, Memory, TrainingWindow
from bench.harness.records import Spread


@dataclass(frozen=True, slots=True)
class RowSummary:
    """One row of the tables. None where nothing was measured.

    Attributes:
        lost: training seconds lost per save.
        inflation: how much longer steps took while the save was in flight: 0.5 is half as long again.
        blocked: seconds in `save` and waiting before optimizer steps.
        stream: seconds for which the compute stream stood still in a window; CUDA only.
        stored_training, stored_idle: seconds from `save` to stored.
        cpu: CPU seconds of the save itself, less what the idle threads and processes of all modes use in the
            same time without a save; cpu_idle: of everything during an idle save.
        cpu_window: CPU seconds of the whole window beyond those of as many steps without a save.
        copied_idle: seconds until the device had copied everything, with training idle; CUDA only.
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
    """All rows, and what they are compared with.

    Attributes:
        step: seconds of a step without a save.
        none_stream: what the events on the compute stream show without a save: their noise.
        raw_lost: training seconds lost while the same bytes are written raw, without a copy or a digest.
    """

    rows: dict[str, RowSummary]
    step: Spread | None
    none_stream: Spread | None
    copy_floor: Spread | None
    write_floor: Spread | None
    write_method: str
    raw_lost: Spread | None = None


@dataclass(frozen=True, slots=True)
class Baseline:
    """One step without a save: the mean of a repeat. `beside_cpu_secs`: of what does not train, which is the
    modes' idle threads and processes, open all the time."""

    secs: float
    cpu_secs: float
    beside_cpu_secs: float


def summarise(measured: Measurements, rows: Sequence[str]) -> Summary:
    """The figures of these rows, in this order."""
    base = baselines(measured.windows)
    nones = [window for window in measured.windows if window.row == NONE]
    raws = [window for window in measured.windows if window.row == RAW and window.repeat in base]
    writes = [floor for floor in measured.floors if floor.name == "write"]
    return Summary(
        rows={name: _row(name, measured, base) for name in rows},
        step=Spread.of(secs for window in nones for secs in window.step_secs),
        none_stream=Spread.of(window.stream_secs for window in nones),
        copy_floor=Spread.of(floor.secs for floor in measured.floors if floor.name == "copy"),
        write_floor=Spread.of(floor.secs for floor in writes),
        write_method=writes[0].method if writes else "",
        raw_lost=Spread.of(lost_secs(window, base[window.repeat].secs) for window in raws),
    )


def baselines(windows: Iterable[TrainingWindow]) -> dict[int, Baseline]:
    """The step without a save, by repeat."""
    nones: dict[int, list[TrainingWindow]] = {}
    for window in windows:
        if window.row == NONE:
            nones.setdefault(window.repeat, []).append(window)

    def mean(repeat: int, figure: Callable[[TrainingWindow], float]) -> float:
        return sum(map(figure, nones[repeat])) / sum(len(window.step_secs) for window in nones[repeat])

    return {
        repeat: Baseline(
            mean(repeat, lambda window: window.window_secs),
            mean(repeat, lambda window: window.process_cpu_secs),
            mean(repeat, lambda window: window.cpu_secs),
        )
        for repeat in nones
    }


def _row(name: str, measured: Measurements, base: dict[int, Baseline]) -> RowSummary:
    windows = [window for window in measured.windows if window.row == name and window.repeat in base]
    idle = [save for save in measured.idle if save.row == name]

    def of(figure: Callable[[TrainingWindow, Baseline], float | None]) -> Spread | None:
        return Spread.of(figure(window, base[window.repeat]) for window in windows)

    return RowSummary(
        name=name,
        lost=of(lambda window, step: lost_secs(window, step.secs)),
        inflation=of(lambda window, step: inflation(window, step.secs)),
        blocked=of(lambda window, _: window.blocked_secs),
        stream=of(lambda window, _: window.stream_secs),
        stored_training=of(lambda window, _: window.stored_secs),
        stored_idle=Spread.of(save.stored_secs for save in idle),
        cpu=of(lambda window, step: max(0.0, window.cpu_secs - step.beside_cpu_secs * len(window.step_secs))),
        cpu_idle=Spread.of(save.cpu_secs for save in idle),
        cpu_window=of(lambda window, step: window.process_cpu_secs - step.cpu_secs * len(window.step_secs)),
        copied_idle=Spread.of(save.copied_secs for save in idle),
        memory=next((one for one in measured.memory if one.row == name), None),
        growth=next((one for one in measured.growth if one.row == name), None),
    )


def lost_secs(window: TrainingWindow, step_secs: float) -> float:
    """What a window took beyond as many steps without a save; noise can make it negative."""
    return window.window_secs - len(window.step_secs) * step_secs


def inflation(window: TrainingWindow, step_secs: float) -> float | None:
    """How much longer the steps took that began while the save was in flight; None if there were none."""
    if window.stored_secs is None:
        return None
    begin, taken = window.save_secs, []
    for secs in window.step_secs:
        if begin >= window.stored_secs:
            break
        taken.append(secs)
        begin += secs
    return sum(taken) / len(taken) / step_secs - 1 if taken else None
