"""What one save costs, counted instead of timed: bytes, allocations, copies, walks, collectives."""

from __future__ import annotations

import os
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine import Checkpointer
from engine.directory import listing
from engine.directory.retention import Retention
from engine.lease.lease import Lease
from engine.native import kernels
from engine.save import staged_snapshot
from engine.save.staging_buffer import StagingBuffer
from engine.state import local_boxes as boxes_module
from engine.state import modules
from engine.storage.base import WINDOW_BYTES
from engine.storage.system import System
from tests.storage.systems import StrictDirect
from tests.support.controlled import DEADLINE_SECS, ControlledStorage, use
from tests.support.training import model, train

State = dict[str, Any]


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlledStorage:
    made = ControlledStorage(tmp_path / "run")
    use(monkeypatch, made)
    return made


def training_state(width: int = 400) -> State:
    network = model(width=width)
    state = {"model": network, "optimizer": torch.optim.AdamW(network.parameters())}
    train(network, state["optimizer"])
    return state


def counted(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[int]:
    """Append to the list with each call of `where.name`."""
    calls: list[int] = []
    real: Callable[..., Any] = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


def header_size(shard: Path) -> int:
    """The safetensors header with its length bytes, as the file itself says."""
    with open(shard, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_a_save_writes_the_shard_the_index_and_the_manifest_and_nothing_else(
    storage: ControlledStorage,
) -> None:
    state = training_state()
    with Checkpointer("ignored", state) as checkpointer:
        before = storage.written.copy()
        record = checkpointer.save(1).result(DEADLINE_SECS)
        checkpointer.wait()
        written = storage.written - before
    assert record is not None
    folder = Path(storage.root) / record.id
    assert dict(written) == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(written) == {"shard-00000.safetensors", "shard-00000.json", "manifest.json"}
    tensors = [t for entry in state["optimizer"].state.values() for t in entry.values()]
    tensors += [*state["model"].state_dict().values()]
    data = sum(t.numel() * t.element_size() for t in tensors)
    generators = 5056 + 8 * (625 + 624)
    header = header_size(folder / "shard-00000.safetensors")
    assert written["shard-00000.safetensors"] == header + data + generators


def test_a_save_is_one_write_of_each_file(storage: ControlledStorage) -> None:
    with Checkpointer("ignored", training_state()) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        checkpointer.wait()
        before = storage.calls.copy()
        checkpointer.save(2).result(DEADLINE_SECS)
        checkpointer.wait()
        assert dict(storage.calls - before) == {"write_shard": 1, "write_file": 1, "publish": 1}


def test_clean_up_reads_no_manifest_twice(
    storage: ControlledStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading those of all checkpoints after each save cost 76 ms a checkpoint, with 10,000 tensors."""
    with Checkpointer("ignored", training_state(), retention=Retention(rolling=100)) as checkpointer:
        read = counted(monkeypatch, listing, "_manifest")
        for step in range(1, 6):
            checkpointer.save(step).result(DEADLINE_SECS)
            checkpointer.wait()
        assert len(read) == 5


def test_the_arena_is_taken_once(storage: ControlledStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted(monkeypatch, StagingBuffer, "__init__")
    state = training_state()
    with Checkpointer("ignored", state) as checkpointer:
        addresses = set()
        for step in range(1, 4):
            checkpointer.save(step).result(DEADLINE_SECS)
            assert checkpointer._saver is not None
            staging = checkpointer._saver.snapshot.staging
            assert staging is not None
            addresses.add(staging.buffer.data_ptr())
            train(*state.values())
    assert len(addresses) == len(taken) == 1


def test_nothing_is_walked_or_planned_when_nothing_changed(
    storage: ControlledStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = counted(monkeypatch, modules, "read_state_dict")
    plans = counted(monkeypatch, boxes_module.DefaultSavePlanner, "create_local_plan")
    state = training_state()
    with Checkpointer("ignored", state) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        assert walks
        assert plans
        walks.clear()
        plans.clear()
        for step in (2, 3):
            train(*state.values())
            checkpointer.save(step).result(DEADLINE_SECS)
        assert not walks
        assert not plans


def test_the_data_is_copied_once_into_memory_that_is_there(storage: ControlledStorage) -> None:
    """Between `save` and the commit neither Python nor torch allocates anything of the data's size."""
    state = training_state(width=20_000)  # 1.6 MB of parameters and moments
    with Checkpointer("ignored", state) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        checkpointer.wait()
        data = sum(path.stat().st_size for path in Path(storage.root).glob("*/shard-00000.safetensors"))
        with torch.profiler.profile(profile_memory=True) as profiler:
            tracemalloc.start()
            checkpointer.save(2).result(DEADLINE_SECS)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        by_torch = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events() or [])
    assert data > 3_000_000
    assert peak < data / 10
    assert by_torch < data / 10


def test_each_tensor_is_copied_once(storage: ControlledStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    real = torch._foreach_copy_

    def noting(to: list[torch.Tensor], source: list[torch.Tensor], **more: Any) -> None:
        copied.extend(t.nbytes for t in to)
        real(to, source, **more)

    state = training_state()
    with Checkpointer("ignored", state) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        monkeypatch.setattr(torch, "_foreach_copy_", noting)
        record = checkpointer.save(2).result(DEADLINE_SECS)
    assert record is not None
    shard = Path(storage.root) / record.id / "shard-00000.safetensors"
    assert sum(copied) == shard.stat().st_size - header_size(shard), "every byte of the file but its header"


@pytest.mark.parametrize(
    "operation", ["broadcast_object_list", "all_reduce", "all_gather_object", "barrier", "gather_object"]
)
def test_no_collective_on_one_process(
    operation: str, storage: ControlledStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, operation, lambda *args, **kwargs: pytest.fail(f"{operation} was called"))
    state = training_state()
    with Checkpointer("ignored", state) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        checkpointer.restore("latest")


def test_the_time_to_check_ten_thousand_tensors_is_a_few_calls_each(storage: ControlledStorage) -> None:
    """Counted in Python calls, which is what it costs: the identity check is one flat pass."""
    network = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1)) for _ in range(2_000)])
    with Checkpointer("ignored", {"model": network}) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        checkpointer.wait()
        assert checkpointer._saver is not None
        capture = checkpointer._saver.capture
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            unchanged = all(module.unchanged() for module in capture.modules.values())
        finally:
            sys.setprofile(None)
    assert unchanged
    assert calls <= 2 * 2_000 + 50


class CountingSystem(StrictDirect):
    """Direct I/O on any file system; counts the calls, and the bytes written."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in CALLS:
            self.calls[name] += 1
        return found


CALLS = {name for name in vars(System) if not name.startswith("_")} - {"monotonic", "write_threads"}


def test_the_system_calls_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reservation, one write for each window, one fsync a file: no pass over the data too many."""
    system = CountingSystem()
    storage = ControlledStorage(tmp_path / "run", system=system)
    use(monkeypatch, storage)
    for name in ("start_heartbeat", "heartbeat"):  # they write in between, at times of their own
        monkeypatch.setattr(Lease, name, lambda lease: None)
    with Checkpointer("ignored", training_state(width=200_000), retention=None) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        checkpointer.wait()
        storage.written.clear()
        system.calls.clear()
        system.direct_bytes = system.buffered_bytes = 0
        record = checkpointer.save(2).result(DEADLINE_SECS)
        checkpointer.wait()
        calls = dict(system.calls)
    assert record is not None
    shard = storage.written.pop("shard-00000.safetensors")
    assert system.direct_bytes == -(-shard // 4096) * 4096
    assert system.buffered_bytes == sum(storage.written.values()), "index and manifest"
    windows = -(-shard // WINDOW_BYTES)
    assert windows > 1
    assert calls == {
        "fallocate": 1, "set_direct": 1, "ftruncate": 1,  # the shard
        "pwrite": windows + 2,
        # Shard, index and manifest; the last two under names of their own until they are whole.
        "create": 3, "fsync": 3, "close": 3, "chmod": 2, "replace": 1, "link": 1, "unlink": 1,
        "mkdir": 1,
        "fsync_dir": 3,  # the new directory in its parent, its files, the manifest
    }


def test_a_save_of_many_tensors_is_a_few_calls_each(storage: ControlledStorage) -> None:
    """Counted in Python calls on the training thread: 10,000 small tensors have to cost little more than
    their copy, and a call that is made for each of them would show."""
    count = 2_000
    network = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1)) for _ in range(count)])
    with Checkpointer("ignored", {"model": network}) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        checkpointer.wait()
        calls = 0

        def note(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(note)
        try:
            handle = checkpointer.save(2)
        finally:
            sys.setprofile(None)
        handle.result(DEADLINE_SECS)
    assert calls <= 2 * count + 1_000


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
def test_digests_stand_back_behind_training_and_nothing_else_does(
    storage: ControlledStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int] = []
    real = staged_snapshot.block_digests

    def spied(view: memoryview) -> bytes:
        levels.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return real(view)

    monkeypatch.setattr(staged_snapshot, "block_digests", spied)
    monkeypatch.setattr(kernels, "library", None)  # with it the copy leaves none to make
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with Checkpointer("ignored", training_state()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step).result(DEADLINE_SECS)
        threads = [int(name) for name in os.listdir("/proc/self/task")]
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {before}
    assert set(levels) == {min(19, before + staged_snapshot.DIGEST_NICENESS)}


@pytest.mark.skipif(kernels.library is None, reason="nothing is compiled")
def test_digests_are_made_by_the_copy_and_not_once_more(
    storage: ControlledStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards they would take the cores that training computes on."""
    monkeypatch.setattr(staged_snapshot, "block_digests", lambda view: pytest.fail("digested again"))
    monkeypatch.setattr(kernels, "block_digests", lambda *args: pytest.fail("digested again"))
    with Checkpointer("ignored", training_state()) as checkpointer:
        for step in (1, 2):
            record = checkpointer.save(step).result(DEADLINE_SECS)
            assert record is not None
