"""Sets up this process as a rank: process group, device, seeds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from engine.errors import ConfigError, CoordinationError
from engine.state import rng

COLLECTIVE_SECS = 1800
"""Long, because a rank may compile or wait for a slow disk; torchrun notices a rank that died."""


@dataclass(frozen=True, slots=True)
class World:
    """This process's rank. Without torchrun: one rank, no process group."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> World:
        """Read torchrun's variables; ConfigError if some are missing or not a number."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        given = [name for name in names if name in environ]
        if not given:
            return cls()
        if len(given) < len(names):
            absent = ", ".join(name for name in names if name not in environ)
            raise ConfigError(f"{', '.join(given)} is set but {absent} is not: start ranks with torchrun")
        wrong = [f"{name} is {environ[name]!r}" for name in names if not environ[name].isdecimal()]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}, which is not a number: start ranks with torchrun")
        return cls(*(int(environ[name]) for name in names))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints for all."""
        return self.rank == 0


def join(world: World, *, cuda: bool) -> None:
    """Form the default process group: gloo for CPU tensors, and NCCL for CUDA tensors if `cuda`.

    Raises CoordinationError if the ranks cannot connect. Does nothing without torchrun.
    """
    if "RANK" not in os.environ:
        return
    backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=COLLECTIVE_SECS)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        if world.local_world_size == world.world_size:
            # torchrun 2.13 keeps one store across restarts, in which ranks would find the addresses of their
            # dead predecessors. On several nodes the agents' counts differ, so no prefix there.
            store = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise CoordinationError(f"rank {world.rank} could not join the other ranks: {error}") from error


def leave() -> None:
    """Destroy the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(wanted: str, world: World) -> torch.device:
    """The device of this rank; a CUDA device is also made current.

    Raises ConfigError if CUDA is not available or the node has fewer devices than ranks.
    """
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError("--device cuda, but torch finds no CUDA device; give --device cpu")
    devices = torch.cuda.device_count()
    if world.local_world_size > devices:
        raise ConfigError(
            f"{world.local_world_size} ranks on this node but {devices} CUDA devices: start {devices} ranks, "
            "or give --device cpu"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def seed_everything(seed: int, world: World, *, deterministic: bool, device: torch.device) -> None:
    """Seed every generator differently on each rank: ranks with the same stream would drop the same units."""
    if device.type == "cuda":
        # TF32 for float32 matrix products: the same exponent range, and common practice in training.
        torch.set_float32_matmul_precision("high")
        if deterministic:
            # cuBLAS is deterministic only with a fixed workspace; it reads this variable when it starts.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Filling every new tensor only helps to find reads of uninitialised memory.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    rng.derive(seed, 0, world.rank)
