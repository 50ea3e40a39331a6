"""One rank's part of a benchmark on a model: rows that fail are left out, and the others go on."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from bench.harness import ranks
from bench.harness.records import Failure
from engine.run.job import Job
from engine.run.world import World

R = TypeVar("R")

_GIVE_UP = 4
"""A measurement that takes this many time limits hangs: the rank prints its stacks and ends."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a way to save works on, and where. `group`: a gloo process group that nothing else uses."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    directory: Path
    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    timeout_secs: float

    @property
    def cuda(self) -> bool:
        """Whether the state is on a CUDA device."""
        return self.device.type == "cuda"


class Session(Generic[R]):
    """What every session of ranks needs. `rows`: those that still work; `failures`: those that do not."""

    def __init__(self, world: World, device: torch.device, directory: Path, timeout_secs: float) -> None:
        self.world = world
        self.device = device
        self.directory = directory
        self.timeout_secs = timeout_secs
        self.rows: dict[str, R] = {}
        self.failures: list[Failure] = []

    @property
    def device_name(self) -> str:
        """ "cpu", or the name of the GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def say(self, text: str) -> None:
        """Report progress on standard error, from rank 0 only: standard output is for the tables."""
        if self.world.is_first:
            print(text, file=sys.stderr, flush=True)

    def context(self, job: Job, folder: str) -> Context:
        """What a way to save needs, with a folder and a process group of its own. Collective."""
        directory = self.directory / folder
        directory.mkdir(exist_ok=True)
        group = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_secs))
        return Context(
            model=job.model,
            optimizer=job.optimizer,
            device=self.device,
            directory=directory,
            rank=self.world.rank,
            world_size=self.world.world_size,
            group=group,
            timeout_secs=self.timeout_secs,
        )

    @contextlib.contextmanager
    def guarded(self, row: str, stage: str) -> Iterator[None]:
        """Record an error within as the failure of a row and drop the row; end the process if it hangs."""
        faulthandler.dump_traceback_later(self.timeout_secs * _GIVE_UP, exit=True)
        try:
            yield
        except Exception as error:
            text = ranks.describe(error)
            self.failures.append(Failure(row, stage, text))
            self.rows.pop(row, None)
            self.say(f"  {row} failed at {stage}: {text}")
        finally:
            faulthandler.cancel_dump_traceback_later()
