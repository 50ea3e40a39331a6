"""One rank's run: builds the trainer, opens every mode, measures all of them interleaved, closes them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bench.cases.modes.base import Save
from bench.cases.modes.raw import RAW, RawWrite
from bench.cases.modes.registry import FLUSHED, NONE, mode_class
from bench.cases.save.bars import Facts
from bench.cases.save.records import Measurements
from bench.cases.save.window import Row, Stage
from bench.harness import ranks
from bench.harness.floors import Floors, state_tensors
from bench.harness.records import Failure, merge, shuffled
from bench.harness.resources import CpuMeter, mapped_blocks, thread_ids
from bench.harness.session import Context, Session
from bench.harness.sizes import parse_state
from bench.harness.training import Training
from engine.run.world import World
from engine.text import readable_bytes

NONE_WINDOWS = 4
"""Windows without a save per repeat: all other rows are compared with them, so they get more samples."""
COPY_PASSES = 3
WRITE_PASSES = 3
RAW_WINDOWS = 2
"""Windows in which the bytes of a save are written, and nothing else is done for it."""

_MEMORY_STEPS = 10
"""Steps without a save that show what training takes by itself."""


class Item(NamedTuple):
    """One thing to measure: a training window or an idle save of a row, or one pass of a floor."""

    kind: Literal["window", "idle", "floor"]
    row: str


def items_of(rows: Sequence[str]) -> list[Item]:
    """Everything that one repeat measures."""
    return [
        *[Item("window", NONE)] * NONE_WINDOWS,
        *(item for row in rows for item in (Item("window", row), Item("idle", row))),
        *[Item("floor", "copy")] * COPY_PASSES,
        *[Item("floor", "write")] * WRITE_PASSES,
        *[Item("window", RAW)] * RAW_WINDOWS,
    ]


class SaveSession(Session[Row]):
    """Everything of one run on this rank."""

    def __init__(
        self, options: argparse.Namespace, world: World, device: torch.device, directory: Path
    ) -> None:
        super().__init__(world, device, directory, options.timeout_secs)
        self.options = options
        self.measured = Measurements(failures=self.failures)
        self.state: dict[str, Any] = {}
        self.facts: dict[str, Facts] = {}

    def run(self) -> dict[str, Any]:
        """Measure everything. Collective; the result is complete on rank 0."""
        options = self.options
        training = self._training(options.state, options.dp_replicate)
        self._describe(training)
        floors = self._floors(training)
        self.rows[RAW] = Row(RAW, RawWrite(self.context(training.job, "raw"), floors))
        # Before any mode is opened: the threads that there are now are those that train.
        stage = self._stage(training)
        self.say(f"one rank writes {readable_bytes(floors.rank_bytes)}; opening the modes")
        with mapped_blocks():
            training_bytes = stage.training_memory(_MEMORY_STEPS)
            for name in options.modes:
                self._open(name, stage, training_bytes, floors.rank_bytes)
        items = items_of([name for name in self.rows if name != RAW])
        for repeat in range(options.repeats):
            for item in shuffled(items, options.seed, repeat):
                if item.row in self.rows or item.row == NONE or item.kind == "floor":
                    save = None
                    with self.guarded(item.row, f"{item.kind} of repeat {repeat + 1}"):
                        save = self._take(item, repeat, stage, floors)
                    stage.rest(save)
        for row in {id(row.mode): row for row in self.rows.values()}.values():
            self._close(row)
        if options.growth_saves:
            self._grow()
        facts = {name: asdict(fact) for name, fact in self.facts.items()}
        return {"state": self.state, "facts": facts, "measured": asdict(self.measured)}

    def _training(self, state: str, dp_replicate: int) -> Training:
        return Training(
            parse_state(state),
            self.world,
            self.device,
            dp_replicate=dp_replicate,
            tokens=16,
            seed=self.options.seed,
        )

    def _stage(self, training: Training) -> Stage:
        return Stage(training, CpuMeter(thread_ids()), self.directory, self.timeout_secs)

    def _describe(self, training: Training) -> None:
        """Choose the batch, and record what is being trained."""
        training.set_tokens(training.tokens_for(self.options.step_secs))
        step_secs = training.warm_up()
        split, loader = training.job.split, training.job.loader
        self.state = {
            "name": self.options.state,
            "ranks": self.world.world_size,
            "device": self.device_name,
            "cuda": self.device.type == "cuda",
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
        self.state["rank_bytes"], self.state["total_bytes"] = max(totals), sum(totals)
        return floors

    def _open(self, name: str, stage: Stage, training_bytes: int, rank_bytes: int) -> None:
        """Open a mode, measure its memory, and give it its rows."""
        open_row = partial(self._row, name, self.context(stage.training.job, name))
        with self.guarded(name, "opening it and the first saves"):
            memory, row = stage.memory(open_row, training_bytes, rank_bytes)
            flushes = row.mode.flushes
            for one in [row] if flushes else [row, Row(name + FLUSHED, row.mode, flushed=True)]:
                self.rows[one.name] = one
                self.facts[one.name] = Facts(flushes or one.flushed, row.mode.consistent_alone)
            taken = max(ranks.gather(memory), key=lambda one: one.share)
            self.measured.memory.append(taken)
            self.say(f"  {name}: {readable_bytes(taken.peak_bytes)} of host memory at its peak")

    def _row(self, name: str, context: Context) -> Row:
        return Row(name, mode_class(name)(context))

    def _take(self, item: Item, repeat: int, stage: Stage, floors: Floors) -> Save | None:
        """Take one measurement and gather it; raises on every rank if its save failed on one."""
        label = f"[{repeat + 1}/{self.options.repeats}] {item.row}"
        if item.kind == "floor":
            one = floors.copy(repeat) if item.row == "copy" else floors.write(repeat)
            floor = max(ranks.gather(one), key=lambda pass_: pass_.secs)
            self.measured.floors.append(floor)
            self.say(f"{label}, floor: {floor.secs:.3f} s")
            return None
        save: Save | None
        if item.kind == "idle":
            idle, save = stage.idle(self.rows[item.row], repeat)
            ranks.raise_together(save.error)
            idle = merge(ranks.gather(idle))
            self.measured.idle.append(idle)
            self.say(f"{label}, training idle: stored after {idle.stored_secs:.2f} s")
            return save
        window, save = stage.window(self.rows.get(item.row), repeat, self.options.steps)
        ranks.raise_together(save.error if save else None)
        window = merge(ranks.gather(window))
        self.measured.windows.append(window)
        self.say(
            f"{label}: {len(window.step_secs)} steps in {window.window_secs:.2f} s, "
            f"blocked {window.blocked_secs:.3f} s"
        )
        return save

    def _grow(self) -> None:
        """Save a small state many times, replicated over the ranks."""
        saves, failed = self.options.growth_saves, {failure.row for failure in self.failures}
        training = self._training(self.options.growth_state, self.world.world_size)
        training.warm_up()
        stage = self._stage(training)
        tensors = state_tensors(training.job.model, training.job.optimizer)
        state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.say(f"{saves} saves of {readable_bytes(state_bytes)} each")
        for name in self.options.modes:
            if name in failed:
                continue
            context = self.context(training.job, f"{name}-growth")
            with self.guarded(name, f"{saves} saves of a small state"):
                row = ranks.together(partial(self._row, name, context))
                growth = stage.growth(row, saves, state_bytes)
                growth = merge(ranks.gather(growth))
                self.measured.growth.append(growth)
                self.say(f"  {name}: grown by {readable_bytes(growth.growth_bytes)}")
                self._close(row)

    def _close(self, row: Row) -> None:
        try:
            row.mode.close()
        except Exception as error:
            self.failures.append(Failure(row.mode.name, "closing it", ranks.describe(error)))
