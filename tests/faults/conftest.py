"""A fast directory for sweeps, and the count of points, states and inputs that a test has covered."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.faults import record


@pytest.fixture
def root() -> Iterator[Path]:
    """A checkpoint directory in memory where there is one: thousands of fsyncs cost nothing there."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="holdfast-faults-", dir=base))
    yield folder / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def empty_memory_store() -> None:
    """fsspec's is one for the process and looks through all of it at each listing: what other tests have
    left there made single tests here take 40 s."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def covered(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Report how many points, states or inputs this test has gone through."""
    return lambda count: record.add(request.node.nodeid, count)
