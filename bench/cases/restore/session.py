"""One rank's part: save every row's checkpoint, or restore all of them interleaved, and measure that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from bench.cases.modes.base import Mode
from bench.cases.modes.registry import HOLDFAST, mode_class
from bench.cases.restore.records import FLOORS, Case, Load, Measured, items_of
from bench.harness import ranks
from bench.harness.floors import local_part, state_tensors
from bench.harness.raw_read import RawRead, drop, warm
from bench.harness.records import Failure, shuffled
from bench.harness.resources import (
    PeakMemory,
    memory_bytes,
    read_bytes,
    settle_memory,
    sync_file_system,
)
from bench.harness.session import Session
from bench.harness.training import random_job
from engine.run.job import Job
from engine.run.world import World
from engine.text import readable_bytes
from model.config import GPT2Config

_TIMEOUT_SECS = 300.0
_FINGERPRINT = "fingerprint"


class RestoreSession(Session[Mode]):
    """One set of ranks with a model, and an optimizer that has its state."""

    def __init__(
        self, model: GPT2Config, world: World, device: torch.device, directory: Path, seed: int
    ) -> None:
        super().__init__(world, device, directory, _TIMEOUT_SECS)
        self._seed = seed
        self._job: Job = random_job(model, world, device, dp_replicate=1, seed=seed)
        for parameter in self._job.parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        self._job.optimizer.step()
        self._job.optimizer.zero_grad()

    @property
    def _tensors(self) -> list[torch.Tensor]:
        """The state as it is now: `load_state_dict` gives an optimizer new tensors."""
        return state_tensors(self._job.model, self._job.optimizer)

    def save(self, rows: Sequence[str]) -> list[Failure]:
        """Write every row's checkpoint, and the sum that a restore must reproduce. Collective."""
        for name in rows:
            with self.guarded(name, "saving"):
                mode = self._mode(name)
                ranks.together(partial(self._save, mode))
                mode.close()
        total = self._fingerprint()
        if self.world.is_first:
            (self.directory / _FINGERPRINT).write_text(repr(total), encoding="ascii")
            sync_file_system(self.directory)
        return self.failures

    def measure(self, case: Case, rows: Sequence[str], repeats: int) -> Measured:
        """Restore everything, interleaved. Collective; the result is complete on rank 0."""
        needed = sum(local_part(tensor).numel() * tensor.element_size() for tensor in self._tensors)
        measured = Measured(case, self.device_name, sum(ranks.gather(needed)), failures=self.failures)
        for name in rows:
            with self.guarded(name, "restoring"):
                self.rows[name] = self._open(name, measured)
        floor_row = HOLDFAST if HOLDFAST in rows else rows[0]
        # Only the files of the checkpoint: the lease beside it is rewritten now and then.
        home = self.directory / floor_row
        files = [file for file in self._files(floor_row) if file.parent != home]
        floors = RawRead(files, self.world.rank, case.restored)
        for repeat in range(repeats):
            for name, cache in shuffled(items_of(rows), self._seed, repeat):
                if name not in self.rows and name not in FLOORS:
                    continue
                with self.guarded(name, f"{cache}, repeat {repeat + 1}"):
                    if name in FLOORS:
                        read = partial(floors.read, FLOORS.index(name) + 1)
                        load = Load(name, cache, repeat, *self._timed(floor_row, cache, read))
                    else:
                        load = self._timed_load(name, cache, repeat)
                    measured.loads.append(load)
                    self.say(f"[{repeat + 1}] {name}, {cache}: {load.secs:.3f} s")
        for mode in self.rows.values():
            mode.close()
        return measured

    def _mode(self, name: str) -> Mode:
        mode: Mode = ranks.together(lambda: mode_class(name)(self.context(self._job, name)))
        return mode

    def _save(self, mode: Mode) -> None:
        save = mode.save(1)
        save.wait(self.timeout_secs)
        if save.error is not None:
            raise save.error

    def _open(self, name: str, measured: Measured) -> Mode:
        """Open a row and restore untimed: is the state what was saved, and how much memory does it take?"""
        mode = self._mode(name)
        ranks.together(mode.prepare)
        ranks.together(mode.load)
        with torch.no_grad():
            for tensor in self._tensors:
                local_part(tensor).zero_()
        ranks.together(mode.prepare)
        settle_memory()
        before, sampled = memory_bytes(), PeakMemory()
        with sampled:
            ranks.together(mode.load)
        expected = float((self.directory / _FINGERPRINT).read_text(encoding="ascii"))
        found = self._fingerprint()
        if not math.isclose(found, expected, rel_tol=1e-9):
            raise ValueError(f"the state was not restored: its sum is {found!r}, but {expected!r} was saved")
        measured.memory[name] = max(ranks.gather(sampled.peak_bytes - before))
        self.say(f"  {name}: {readable_bytes(measured.memory[name])} of host memory above the tensors")
        return mode

    def _timed_load(self, name: str, cache: str, repeat: int) -> Load:
        mode = self.rows[name]
        # Every time: another row may have given the optimizer new tensors.
        ranks.together(mode.prepare)
        secs, disk_bytes = self._timed(name, cache, partial(self._load, mode))
        asked_bytes = sum(ranks.gather(mode.read_bytes or 0))
        return Load(name, cache, repeat, secs, disk_bytes, asked_bytes or None)

    def _timed(self, files_of: str, cache: str, action: Callable[[], object]) -> tuple[float, int]:
        """Seconds of the slowest rank, and bytes that all ranks read from the disk. Collective."""
        if self.world.is_first:
            (warm if cache == "warm" else drop)(self._files(files_of))
        settle_memory()
        ranks.barrier()
        read, begun = read_bytes(), time.perf_counter()
        ranks.together(action)
        seen = ranks.gather((time.perf_counter() - begun, read_bytes() - read))
        return max(secs for secs, _ in seen), sum(read for _, read in seen)

    def _load(self, mode: Mode) -> None:
        mode.load()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _files(self, name: str) -> list[Path]:
        """All files of a row's checkpoint, largest first."""
        found = [path for path in (self.directory / name).rglob("*") if path.is_file()]
        return sorted(found, key=lambda path: (-path.stat().st_size, path))

    def _fingerprint(self) -> float:
        """One number for the whole state, the same at every world size: replicated tensors count once."""
        total = 0.0
        for number, tensor in enumerate(self._tensors, start=1):
            if isinstance(tensor, DTensor) or self.world.is_first:
                total += float(local_part(tensor).double().abs().sum()) / number
        return math.fsum(ranks.gather(total))
