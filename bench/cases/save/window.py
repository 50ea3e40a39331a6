"""One measurement: a training window, an idle save, a mode's memory, or many saves of a small state."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases.modes.base import Mode, Save
from bench.cases.modes.fsynced import save_and_flush
from bench.cases.modes.registry import NONE
from bench.cases.save.records import Growth, IdleSave, Memory, TrainingWindow
from bench.harness import ranks
from bench.harness.resources import (
    CpuMeter,
    PeakMemory,
    memory_bytes,
    saving_secs,
    settle_memory,
    sync_file_system,
    total_secs,
    written_bytes,
)
from bench.harness.training import Training

SETTLED_SAVES = 10
"""After this many saves, the caches of a mode count as filled."""


@dataclass(slots=True)
class Row:
    """One row of the tables: a mode, as it is or with a flush."""

    name: str
    mode: Mode
    flushed: bool = False
    saves: int = 0

    def save(self) -> Save:
        """Start a save; one that could not even start is over, with its error."""
        self.saves += 1
        number = self.saves * 2 + self.flushed  # the row with the flush shares the mode's directory
        try:
            return save_and_flush(self.mode, number) if self.flushed else self.mode.save(number)
        except Exception as error:
            save = Save(self.mode.path(number))
            save.end(error)
            return save

    def poll(self, save: Save) -> None:
        """Let the mode look for failures after a step."""
        try:
            self.mode.poll()
        except Exception as error:
            save.end(error)


@dataclass(slots=True)
class WindowLength:
    """Decides when a window is long enough. All ranks pass the same answers, so all agree.

    A window has at least `minimum` steps, and at least `quiet` steps after the save is stored on all ranks,
    so that what a save leaves for the disk to do is charged to it.
    """

    minimum: int
    quiet: int = 2
    steps: int = 0
    calm: int = 0

    def after_step(self, *, in_flight: bool) -> bool:
        """Count a step, with a save `in_flight` on some rank or on none. Returns whether to go on."""
        self.steps += 1
        self.calm = 0 if in_flight else self.calm + 1
        return self.steps < self.minimum or self.calm < self.quiet


@dataclass(slots=True)
class Stage:
    """Where measurements take place: a training loop, a disk, and a limit for the time of a save.

    All methods are collective.
    """

    training: Training
    cpu: CpuMeter
    directory: Path
    timeout_secs: float

    def rest(self, save: Save | None) -> None:
        """Between measurements: delete what was written, wait for the disk, and take one untimed step."""
        self._delete(save)
        ranks.barrier()
        sync_file_system(self.directory)
        self.training.step()
        ranks.barrier()

    def window(self, row: Row | None, repeat: int, steps: int) -> tuple[TrainingWindow, Save | None]:
        """Train for at least `steps` steps with a save at the start, until the save is over."""
        length, gate = WindowLength(steps), self.training.gate
        gate.begin(row.mode if row else None)
        written = written_bytes()
        begun_cpu = self.cpu.read()
        begun = time.perf_counter()
        save = row.save() if row else None
        returned = time.perf_counter()
        returned_cpu = self.cpu.read()
        in_time = _in_flight(save, begun + self.timeout_secs)
        step_secs = []
        more = True
        while more:
            secs, in_flight = self.training.step(in_time)
            step_secs.append(secs)
            if row and save:
                row.poll(save)
            more = length.after_step(in_flight=in_flight)
        ended = time.perf_counter()
        gate_secs, stream_secs = gate.waited_secs, gate.end()
        self._await_end(save)
        end_cpu = self.cpu.read()
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

    def idle(self, row: Row, repeat: int) -> tuple[IdleSave, Save]:
        """One save while nothing else runs."""
        device = self.training.job.device
        begun_cpu = self.cpu.read()
        begun = time.perf_counter()
        save = row.save()
        returned = time.perf_counter()
        copied_secs = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            copied_secs = time.perf_counter() - begun
        self._await_end(save)
        end_cpu = self.cpu.read()
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

    def training_memory(self, steps: int) -> int:
        """How far training without saves rises above its level between steps, in bytes.

        Ranks that wait for each other hold more at some times than at others: a few steps are not enough.
        """
        settle_memory()
        level = memory_bytes()
        with PeakMemory() as peak:
            for _ in range(steps):
                self.training.step()
        return peak.peak_bytes - level

    def memory(self, open_row: Callable[[], Row], training_bytes: int, rank_bytes: int) -> tuple[Memory, Row]:
        """Open a mode, save twice while training, and see how much memory it takes.

        The first saves of a mode fill its caches; these are the first, so no timed window pays for that.

        Args:
            training_bytes: what `training_memory` has returned.
        """
        settle_memory()
        level = memory_bytes()
        row = ranks.together(open_row)
        with PeakMemory() as peak:
            for _ in range(2):
                self._save_and_delete(row)
        settle_memory()
        held = memory_bytes() - level
        above = peak.peak_bytes - level - training_bytes
        return Memory(row.name, max(0, above), max(0, held), rank_bytes), row

    def growth(self, row: Row, saves: int, state_bytes: int) -> Growth:
        """Save a small state many times, with a step between: does memory grow once caches are filled?"""
        level, written = 0, 0
        settled = min(SETTLED_SAVES, saves - 1)
        for number in range(saves):
            if number == settled:
                settle_memory()
                level, written = memory_bytes(), written_bytes()
            self._save_and_delete(row)
        settle_memory()
        per_save = round((written_bytes() - written) / (saves - settled))
        return Growth(row.name, saves, settled, state_bytes, memory_bytes() - level, (per_save,))

    def _save_and_delete(self, row: Row) -> None:
        """One save, training until it is over; raises on every rank if it failed on one."""
        self.training.gate.begin(row.mode)
        deadline = time.perf_counter() + self.timeout_secs
        save = row.save()
        more = True
        while more:
            _, more = self.training.step(_in_flight(save, deadline))
            row.poll(save)
        self.training.gate.end()
        self._await_end(save)
        ranks.raise_together(save.error)
        self._delete(save)
        ranks.barrier()

    def _delete(self, save: Save | None) -> None:
        if save is not None and self.training.job.world.is_first:
            shutil.rmtree(save.path, ignore_errors=True)

    def _await_end(self, save: Save | None) -> None:
        """Wait for the end of a save; running out of time becomes its error."""
        if save is None:
            return
        try:
            save.wait(self.timeout_secs)
        except TimeoutError as error:
            save.end(error)


def _in_flight(save: Save | None, deadline: float) -> Callable[[], bool]:
    """Whether to go on training for this save: no longer when it is over, or when it takes too long."""
    return lambda: save is not None and not save.over and time.perf_counter() < deadline
