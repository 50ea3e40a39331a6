"""One measurement: a training window, an idle save, a mode's memory, or many saves of a small state."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import ranks
from bench.modes.base import Mode, Save
from bench.modes.fsynced import save_and_flush
from bench.plan import WindowLength
from bench.records import NONE, Growth, IdleSave, Memory, TrainingWindow
from bench.resources import (
    CpuMeter,
    PeakMemory,
    memory_bytes,
    saving_secs,
    settle_memory,
    sync_file_system,
    total_secs,
    written_bytes,
)
from bench.training import Training

SETTLED_SAVES = 10
"""Saves after which a mode's caches count as filled."""


@dataclass(slots=True)
class Row:
    """One line of the tables: a mode, as it is or with a flush."""

    name: str
    mode: Mode
    flushed: bool
    saves: int = 0

    def save(self) -> Save:
        """Start a save; one that could not even start is over with its error."""
        self.saves += 1
        number = self.saves * 2 + self.flushed  # the row with the flush shares the mode's directory
        try:
            return save_and_flush(self.mode, number) if self.flushed else self.mode.save(number)
        except Exception as error:
            save = Save(self.mode.path(number))
            save.end(error)
            return save


def rest(training: Training, save: Save | None, directory: str | os.PathLike[str]) -> None:
    """Between measurements: delete what was written, wait for the disk, take one step that nobody times."""
    if save is not None and training.job.world.is_first:
        shutil.rmtree(save.path, ignore_errors=True)
    ranks.barrier()
    sync_file_system(directory)
    training.step()
    ranks.barrier()


def run_window(
    training: Training, row: Row | None, repeat: int, cpu: CpuMeter, steps: int, timeout_secs: float
) -> tuple[TrainingWindow, Save | None]:
    """Train for at least `steps` steps with a save at the start, until the save is over. Collective."""
    length = WindowLength(steps)
    training.gate.begin(row.mode if row else None)
    written = written_bytes()
    begun_cpu = cpu.read()
    begun = time.perf_counter()
    save = row.save() if row else None
    returned = time.perf_counter()
    returned_cpu = cpu.read()
    in_time = _in_flight(save, begun + timeout_secs)
    step_secs = []
    more = True
    while more:
        secs, in_flight = training.step(in_time)
        step_secs.append(secs)
        if row:
            _poll(row, save)
        more = length.after_step(in_flight=in_flight)
    ended = time.perf_counter()
    gate_secs, stream_secs = training.gate.waited_secs, training.gate.end()
    _outcome(save, timeout_secs)
    end_cpu = cpu.read()
    window = TrainingWindow(
        row=row.name if row else NONE,
        repeat=repeat,
        window_secs=ended - begun,
        step_secs=tuple(step_secs),
        save_secs=returned - begun if row else 0.0,
        gate_secs=gate_secs,
        stream_secs=stream_secs,
        stored_secs=save.ended_at - begun if save else None,
        cpu_secs=saving_secs(begun_cpu, returned_cpu if row else begun_cpu, end_cpu),
        process_cpu_secs=total_secs(begun_cpu, end_cpu),
        written_bytes=(written_bytes() - written,),
        causes=save.causes if save else {},
    )
    return window, save


def run_idle(
    training: Training, row: Row, repeat: int, cpu: CpuMeter, timeout_secs: float
) -> tuple[IdleSave, Save]:
    """One save while nothing else runs. Collective."""
    begun_cpu = cpu.read()
    begun = time.perf_counter()
    save = row.save()
    returned = time.perf_counter()
    copied_secs = None
    if training.job.device.type == "cuda":
        torch.cuda.synchronize(training.job.device)
        copied_secs = time.perf_counter() - begun
    _outcome(save, timeout_secs)
    end_cpu = cpu.read()
    idle = IdleSave(
        row=row.name,
        repeat=repeat,
        save_secs=returned - begun,
        stored_secs=save.ended_at - begun,
        cpu_secs=total_secs(begun_cpu, end_cpu),
        copied_secs=copied_secs,
        causes=save.causes,
    )
    return idle, save


def training_memory(training: Training, steps: int) -> int:
    """How far training without saves rises above its level between steps, in bytes. Collective.

    Ranks that wait for each other hold more or less at a time: the highest of a few steps says little.
    """
    settle_memory()
    level = memory_bytes()
    with PeakMemory() as peak:
        for _ in range(steps):
            training.step()
    return peak.peak_bytes - level


def measure_memory(
    training: Training,
    open_row: Callable[[], Row],
    training_bytes: int,
    rank_bytes: int,
    timeout_secs: float,
) -> tuple[Memory, Row]:
    """Open a mode, save twice while training, and see what it takes. Collective.

    Args:
        training_bytes: what `training_memory` has shown.

    The first saves of a mode pay for its caches: these are they, so no timed window has to.
    """
    settle_memory()
    level = memory_bytes()
    row = ranks.together(open_row)
    with PeakMemory() as peak:
        for _ in range(2):
            _save_and_delete(training, row, timeout_secs)
    settle_memory()
    held = memory_bytes() - level
    above = peak.peak_bytes - level - training_bytes
    return Memory(row.name, max(0, above), max(0, held), rank_bytes), row


def measure_growth(training: Training, row: Row, saves: int, state_bytes: int, timeout_secs: float) -> Growth:
    """Save a small state many times with a step in between: does memory rise once caches are filled?"""
    level, written = 0, 0
    settled = min(SETTLED_SAVES, saves - 1)
    for number in range(saves):
        if number == settled:
            settle_memory()
            level, written = memory_bytes(), written_bytes()
        _save_and_delete(training, row, timeout_secs)
    settle_memory()
    per_save = round((written_bytes() - written) / (saves - settled))
    return Growth(row.name, saves, settled, state_bytes, memory_bytes() - level, (per_save,))


def _save_and_delete(training: Training, row: Row, timeout_secs: float) -> None:
    """One save, training until it is over; raises on every rank where it failed on one."""
    training.gate.begin(row.mode)
    deadline = time.perf_counter() + timeout_secs
    save = row.save()
    more = True
    while more:
        _, more = training.step(_in_flight(save, deadline))
        _poll(row, save)
    training.gate.end()
    _outcome(save, timeout_secs)
    ranks.raise_together(save.error)
    if training.job.world.is_first:
        shutil.rmtree(save.path, ignore_errors=True)
    ranks.barrier()


def _in_flight(save: Save | None, deadline: float) -> Callable[[], bool]:
    """Whether to go on training for this save: not once it is over, nor when it takes too long."""
    return lambda: save is not None and not save.over and time.perf_counter() < deadline


def _outcome(save: Save | None, timeout_secs: float) -> None:
    """Wait for the end of a save; running out of time becomes its error."""
    if save is None:
        return
    try:
        save.wait(timeout_secs)
    except TimeoutError as error:
        save.end(error)


def _poll(row: Row, save: Save | None) -> None:
    try:
        row.mode.poll()
    except Exception as error:
        if save is not None:
            save.end(error)
