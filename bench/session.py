"""One rank's run: builds the trainer, opens every mode, measures all of them interleaved, closes them.

A mode that fails on any rank is reported with its error and left out from then on; the others go on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench import ranks
from bench.floors import Floors, state_tensors
from bench.modes.base import Context, Mode, Save
from bench.modes.fsynced import wants_flush
from bench.modes.raw import RawWrite
from bench.modes.registry import FLUSHED, load
from bench.options import Options
from bench.plan import Item, order_of
from bench.records import (
    NONE,
    RAW,
    Failure,
    Growth,
    Measurements,
    hungriest,
    merge_growth,
    merge_idle,
    merge_windows,
    slowest_floor,
)
from bench.resources import CpuMeter, mapped_blocks, thread_ids
from bench.sizes import parse_state
from bench.targets import Facts
from bench.training import Training
from bench.window import Row, measure_growth, measure_memory, rest, run_idle, run_window, training_memory
from engine.run.setup import World

_GIVE_UP = 4
"""A measurement that takes this many time limits hangs for good: the rank prints its stacks and ends."""

_MEMORY_STEPS = 10
"""Steps without a save that show what training takes by itself."""


class Session:
    """Everything of one run on this rank. `say` prints progress, on rank 0 only."""

    def __init__(self, options: Options, world: World, device: torch.device, directory: Path) -> None:
        self.options = options
        self.world = world
        self.device = device
        self.directory = directory
        self.measured = Measurements()
        self.rows: dict[str, Row] = {}
        self.state: dict[str, Any] = {}
        self.facts: dict[str, Facts] = {}

    def run(self) -> Measurements:
        """Measure everything. Collective; the result is complete on rank 0."""
        options = self.options
        shape = parse_state(options.state)
        training = Training(
            shape,
            self.world,
            self.device,
            dp_replicate=options.dp_replicate,
            tokens=16,
            seed=options.seed,
        )
        self._describe(training)
        floors = self._floors(training)
        self.rows[RAW] = Row(RAW, RawWrite(self._context(training, "raw"), floors), flushed=False)
        threads = thread_ids()
        self.say(f"one rank writes {floors.rank_bytes / 1e9:.3f} GB; opening the modes")
        with mapped_blocks():
            training_bytes = training_memory(training, _MEMORY_STEPS)
            for name in options.modes:
                self._open(name, training, training_bytes, floors.rank_bytes)
        cpu = CpuMeter(threads)
        modes = [name for name in self.rows if name != RAW]
        for repeat in range(options.repeats):
            for item in order_of(modes, repeat, options.seed):
                self._measure(item, training, floors, cpu)
        for mode in {id(row.mode): row.mode for row in self.rows.values()}.values():
            self._close(mode)
        if options.growth_saves:
            self._grow(list(options.modes))
        return self.measured

    def say(self, text: str) -> None:
        """Progress, on standard error: standard output is for the tables."""
        if self.world.is_first:
            print(text, file=sys.stderr, flush=True)

    def _describe(self, training: Training) -> None:
        """Settle the batch, and note what is being trained."""
        tokens = training.tokens_for(self.options.step_secs)
        training.set_tokens(tokens)
        step_secs = training.warm_up()
        split, loader = training.job.split, training.job.loader
        self.state = {
            "parameters": sum(parameter.numel() for parameter in training.job.parameters),
            "tensors": len(state_tensors(training.job.model, training.job.optimizer)),
            "rows_per_rank": split.rows,
            "seq_len": loader.seq_len,
            "step_secs": step_secs,
            "threads_per_rank": torch.get_num_threads(),
        }
        self.say(
            f"{self.state['parameters'] / 1e6:.1f} M parameters, {split.rows} x {loader.seq_len} tokens "
            f"a rank, steps of {step_secs:.2f} s"
        )

    def _floors(self, training: Training) -> Floors:
        replicas = self.options.dp_replicate
        replica = self.world.rank // (self.world.world_size // replicas)
        tensors = state_tensors(training.job.model, training.job.optimizer)
        folder = self.directory / f"floors-{self.world.rank}"
        folder.mkdir()
        floors = Floors(tensors, replica, replicas, folder)
        totals = ranks.gather(floors.rank_bytes)
        self.state["rank_bytes"] = max(totals)
        self.state["total_bytes"] = sum(totals)
        return floors

    def _context(self, training: Training, folder: str) -> Context:
        directory = self.directory / folder
        directory.mkdir(exist_ok=True)
        timeout_secs = self.options.timeout_secs
        group = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_secs))
        return Context(
            model=training.job.model,
            optimizer=training.job.optimizer,
            device=self.device,
            directory=directory,
            rank=self.world.rank,
            world_size=self.world.world_size,
            group=group,
            timeout_secs=timeout_secs,
        )

    def _open(self, name: str, training: Training, training_bytes: int, rank_bytes: int) -> None:
        """Open a mode, take its memory, and give it its rows."""
        context = self._context(training, name)

        def open_row() -> Row:
            return Row(name, load(name)(context), flushed=False)

        with self._guarded(name, "opening it and the first saves"):
            memory, row = measure_memory(
                training, open_row, training_bytes, rank_bytes, self.options.timeout_secs
            )
            rows = [row]
            if wants_flush(row.mode):
                rows.append(Row(name + FLUSHED, row.mode, flushed=True))
            for one in rows:
                durable = one.flushed or not wants_flush(one.mode)
                self.rows[one.name] = one
                self.facts[one.name] = Facts(durable, one.mode.consistent_alone)
            taken = hungriest(ranks.gather(memory))
            self.measured.memory.append(taken)
            self.say(f"  {name}: {taken.peak_bytes / 1e9:.2f} GB of host memory at its peak")

    def _measure(self, item: Item, training: Training, floors: Floors, cpu: CpuMeter) -> None:
        if item.row in self.rows or item.row == NONE or item.kind == "floor":
            save = None
            with self._guarded(item.row, f"{item.kind} of repeat {item.repeat + 1}"):
                save = self._take(item, training, floors, cpu)
            rest(training, save, self.directory)

    def _take(self, item: Item, training: Training, floors: Floors, cpu: CpuMeter) -> Save | None:
        """Take one measurement and gather it; raises on every rank where its save failed on one."""
        measured, timeout_secs = self.measured, self.options.timeout_secs
        label = f"[{item.repeat + 1}/{self.options.repeats}] {item.row}"
        if item.kind == "floor":
            one = floors.copy(item.repeat) if item.row == "copy" else floors.write(item.repeat)
            floor = slowest_floor(ranks.gather(one))
            measured.floors.append(floor)
            self.say(f"{label}, floor: {floor.secs:.3f} s")
            return None
        row = self.rows.get(item.row)
        if item.kind == "idle":
            assert row is not None
            idle, save = run_idle(training, row, item.repeat, cpu, timeout_secs)
            ranks.raise_together(save.error)
            merged = merge_idle(ranks.gather(idle))
            measured.idle.append(merged)
            self.say(f"{label}, training idle: stored after {merged.stored_secs:.2f} s")
            return save
        seen, window_save = run_window(training, row, item.repeat, cpu, self.options.steps, timeout_secs)
        ranks.raise_together(window_save.error if window_save else None)
        window = merge_windows(ranks.gather(seen))
        measured.windows.append(window)
        self.say(
            f"{label}: {len(window.step_secs)} steps in {window.window_secs:.2f} s, "
            f"blocked {window.blocked_secs:.3f} s"
        )
        return window_save

    def _grow(self, names: list[str]) -> None:
        """Many saves of a small state, replicated where there are several ranks."""
        options, world = self.options, self.world
        failed = {failure.row for failure in self.measured.failures}
        shape = parse_state(options.growth_state)
        training = Training(
            shape, world, self.device, dp_replicate=world.world_size, tokens=16, seed=options.seed
        )
        training.warm_up()
        tensors = state_tensors(training.job.model, training.job.optimizer)
        state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.say(f"{options.growth_saves} saves of {state_bytes / 1e6:.1f} MB each")
        for name in names:
            if name in failed:
                continue
            context = self._context(training, f"{name}-growth")
            with self._guarded(name, f"{options.growth_saves} saves of a small state"):
                mode = ranks.together(_maker(name, context))
                row = Row(name, mode, flushed=False)
                growth: Growth = measure_growth(
                    training, row, options.growth_saves, state_bytes, options.timeout_secs
                )
                merged = merge_growth(ranks.gather(growth))
                self.measured.growth.append(merged)
                self.say(f"  {name}: {merged.growth_bytes / 1e6:+.2f} MB")
                self._close(mode)

    @contextlib.contextmanager
    def _guarded(self, row: str, stage: str) -> Iterator[None]:
        """Note the failure of a mode and leave it out; end this process if it hangs for good."""
        faulthandler.dump_traceback_later(self.options.timeout_secs * _GIVE_UP, exit=True)
        try:
            yield
        except Exception as error:
            text = ranks.describe(error)
            self.measured.failures.append(Failure(row, stage, text))
            self.rows.pop(row, None)
            self.say(f"  {row} failed at {stage}: {text}")
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _close(self, mode: Mode) -> None:
        try:
            mode.close()
        except Exception as error:
            self.measured.failures.append(Failure(mode.name, "closing it", ranks.describe(error)))


def _maker(name: str, context: Context) -> Callable[[], Mode]:
    def make() -> Mode:
        mode: Mode = load(name)(context)
        return mode

    return make
