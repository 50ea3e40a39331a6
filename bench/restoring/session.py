"""One rank's part: save every row's checkpoint, or restore all of them interleaved and measure that.

A row that fails on any rank is reported with its error and left out from then on; the others go on.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from bench import ranks
from bench.floors import state_tensors
from bench.modes.base import Context
from bench.records import Failure
from bench.resources import PeakMemory, memory_bytes, settle_memory, sync_file_system
from bench.restoring.raw import RawRead, disk_bytes, drop, warm
from bench.restoring.records import FLOORS, Case, Load, Measured, order_of
from bench.restoring.registry import HOLDFAST
from bench.restoring.rows import CLASSES, Row
from bench.training import build_job
from engine.run.job import Job
from engine.run.setup import World
from model.config import GPT2Config

_TIMEOUT_SECS = 300.0


class Session:
    """One set of ranks with a model and an optimizer that has its state."""

    def __init__(
        self, model: GPT2Config, world: World, device: torch.device, directory: Path, seed: int
    ) -> None:
        self.world = world
        self.device = device
        self.directory = directory
        self._seed = seed
        self._floor_row = HOLDFAST
        self._job: Job = build_job(model, world, device, dp_replicate=1, seed=seed)
        for parameter in self._job.parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        self._job.optimizer.step()
        self._job.optimizer.zero_grad()

    @property
    def _tensors(self) -> list[torch.Tensor]:
        """The state as it is now: `load_state_dict` gives an optimizer new tensors."""
        return state_tensors(self._job.model, self._job.optimizer)

    def save(self, rows: Sequence[str]) -> list[Failure]:
        """Write every row's checkpoint, and what a restore has to bring back. Collective."""
        failures: list[Failure] = []
        for name in rows:
            with self._noted(name, "saving", failures):
                row = ranks.together(lambda name=name: CLASSES[name](self._context(name)))  # type: ignore[misc]
                ranks.together(row.save)
                row.close()
        total = self._fingerprint()
        if self.world.is_first:
            (self.directory / "fingerprint").write_text(repr(total), encoding="ascii")
            sync_file_system(self.directory)
        return failures

    def measure(self, case: Case, rows: Sequence[str], repeats: int) -> Measured:
        """Restore everything, interleaved. Collective; the result is complete on rank 0."""
        needed = sum(_local(tensor).numel() * tensor.element_size() for tensor in self._tensors)
        measured = Measured(case, _device_name(self.device), sum(ranks.gather(needed)))
        opened: dict[str, Row] = {}
        for name in rows:
            with self._noted(name, "restoring", measured.failures):
                opened[name] = self._open(name, measured)
        self._floor_row = HOLDFAST if HOLDFAST in rows else rows[0]
        # Not what lies beside the checkpoint: a lease is written anew now and then.
        home = self.directory / self._floor_row
        files = [file for file in self._files(self._floor_row) if file.parent != home]
        floors = RawRead(files, self.world.rank, case.restored)
        for repeat in range(repeats):
            for name, cache in order_of(rows, repeat, self._seed):
                if name not in opened and name not in FLOORS:
                    continue
                alive = False
                with self._noted(name, f"{cache}, repeat {repeat + 1}", measured.failures):
                    action = self._floor(floors, name) if name in FLOORS else self._load(opened[name])
                    measured.loads.append(self._timed(action, name, cache, repeat, opened.get(name)))
                    alive = True
                if not alive:
                    opened.pop(name, None)
        for row in opened.values():
            row.close()
        return measured

    def _open(self, name: str, measured: Measured) -> Row:
        """Open a row and restore once, untimed: is the state what was saved, and what memory does it take?"""
        row = ranks.together(lambda: CLASSES[name](self._context(name)))
        ranks.together(row.prepare)
        ranks.together(row.load)
        self._clear()
        ranks.together(row.prepare)
        settle_memory()
        before, sampled = memory_bytes(), PeakMemory()
        with sampled:
            ranks.together(row.load)
        expected = float((self.directory / "fingerprint").read_text(encoding="ascii"))
        found = self._fingerprint()
        if not math.isclose(found, expected, rel_tol=1e-9):
            raise ValueError(f"the state was not restored: its sum is {found!r}, {expected!r} was saved")
        measured.memory[name] = max(ranks.gather(sampled.peak_bytes - before))
        self._say(f"  {name}: {measured.memory[name] / 1e6:.0f} MB of host memory above the tensors")
        return row

    def _timed(self, action: Callable[[], None], name: str, cache: str, repeat: int, row: Row | None) -> Load:
        # Anew each time: another row may have given the optimizer new tensors.
        if row is not None:
            ranks.together(row.prepare)
        files = self._files(name if row is not None else self._floor_row)
        if self.world.is_first:
            (warm if cache == "warm" else drop)(files)
        settle_memory()
        ranks.barrier()
        read, begin = disk_bytes(), time.perf_counter()
        ranks.together(action)
        secs, read = time.perf_counter() - begin, disk_bytes() - read
        asked = row.read_bytes if row else None
        seen = ranks.gather((secs, read, asked or 0))
        load = Load(
            name,
            cache,
            repeat,
            max(secs for secs, _, _ in seen),
            sum(read for _, read, _ in seen),
            sum(asked for _, _, asked in seen) or None,
        )
        self._say(f"[{repeat + 1}] {name}, {cache}: {load.secs:.3f} s")
        return load

    def _load(self, row: Row) -> Callable[[], None]:
        def load() -> None:
            row.load()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return load

    def _floor(self, floors: RawRead, name: str) -> Callable[[], None]:
        def read() -> None:
            floors.read(FLOORS.index(name) + 1)

        return read

    def _files(self, name: str) -> list[Path]:
        """All files of a row's checkpoint, largest first."""
        found = [path for path in (self.directory / name).rglob("*") if path.is_file()]
        return sorted(found, key=lambda path: (-path.stat().st_size, path))

    def _context(self, name: str) -> Context:
        directory = self.directory / name
        directory.mkdir(exist_ok=True)
        return Context(
            model=self._job.model,
            optimizer=self._job.optimizer,
            device=self.device,
            directory=directory,
            rank=self.world.rank,
            world_size=self.world.world_size,
            group=dist.new_group(backend="gloo") if dist.is_initialized() else None,
            timeout_secs=_TIMEOUT_SECS,
        )

    def _fingerprint(self) -> float:
        """One number for the whole state, the same at every world size: replicated tensors count once."""
        total = 0.0
        for number, tensor in enumerate(self._tensors, start=1):
            if isinstance(tensor, DTensor) or self.world.is_first:
                total += float(_local(tensor).double().abs().sum()) / number
        return math.fsum(ranks.gather(total))

    def _clear(self) -> None:
        with torch.no_grad():
            for tensor in self._tensors:
                _local(tensor).zero_()

    def _say(self, text: str) -> None:
        if self.world.is_first:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _noted(self, row: str, stage: str, failures: list[Failure]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failures.append(Failure(row, stage, ranks.describe(error)))
            self._say(f"  {row} failed at {stage}: {ranks.describe(error)}")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
