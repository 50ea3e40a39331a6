"""Forked children end at once with their own status and touch nothing of the parent's run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from engine import Checkpointer
from engine.errors import ConfigError, DirectoryHeldError, LeaseLostError, SaveFailedError
from engine.forks import Home, in_child
from engine.format.names import parse_lease
from engine.lease.lease import Lease
from engine.mirror.uploader import Mirror
from engine.run.preemption import Preemption, Request
from engine.save import unclosed as exit_module
from engine.save.outcomes import SaveHandle
from engine.storage.local import LocalStorage
from tests.support.controlled import DEADLINE_SECS, ControlledStorage, use
from tests.support.tiers import steps_in

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).resolve().parents[2]
TIMES = 50


def run_child(work: Callable[[], object]) -> int | None:
    """Fork, do the work, and end as Python ends: with exit hooks. The child's status."""
    child = FORK.Process(target=work)
    child.start()
    child.join(DEADLINE_SECS)
    if child.is_alive():
        child.kill()
        pytest.fail("the child does not end")
    return child.exitcode


def tree(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes, but for leases, whose heartbeat is the parent's."""
    files = [path for path in folder.rglob("*") if path.is_file() and parse_lease(path.name) is None]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def leases(folder: Path) -> list[tuple[str, bool]]:
    """Each with whether it was released."""
    files = [path for path in folder.iterdir() if parse_lease(path.name) is not None]
    return sorted((path.name, json.loads(path.read_bytes())["released"]) for path in files)


class Job:
    """A run with a mirror, whose storages can be held up."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.local = ControlledStorage(folder / "local")
        self.mirror = ControlledStorage(folder / "mirror")
        use(monkeypatch, self.local)
        monkeypatch.setattr("engine.mirror.uploader.open_storage", lambda address, options=None: self.mirror)
        self.mirrored = threading.Semaphore(0)
        self.state = {"values": {"t": torch.zeros(3000), "n": 0}}
        self.checkpointer = Checkpointer("ignored", self.state, mirror="mirror:", on_event=self.note)
        self.folders = (folder / "local", folder / "mirror")

    def note(self, event: dict[str, Any]) -> None:
        if event["event"] == "mirror_copied":
            self.mirrored.release()

    def save(self, step: int) -> SaveHandle:
        self.state["values"]["n"] = step
        return self.checkpointer.save(step)

    def awaits_copy(self) -> None:
        assert self.mirrored.acquire(timeout=DEADLINE_SECS)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    made = Job(tmp_path, monkeypatch)
    yield made
    made.local.gate.set()
    made.mirror.gate.set()
    made.checkpointer.close()


def inside_with(job: Job) -> None:
    with job.checkpointer:
        sys.exit(3)


WAYS: tuple[Callable[[Job], object], ...] = (
    lambda job: sys.exit(3),
    lambda job: (job.checkpointer.close(), sys.exit(3)),
    lambda job: (job.checkpointer.__del__(), sys.exit(3)),
    lambda job: (exit_module._finish_all(), sys.exit(3)),
    inside_with,
)


@pytest.mark.parametrize("phase", ["idle", "saving", "mirroring"])
def test_a_child_ends_with_its_own_status_and_touches_nothing(job: Job, phase: str) -> None:
    job.save(1).result(DEADLINE_SECS)
    job.awaits_copy()
    if phase == "saving":
        job.local.gate.clear()
        job.local.writing.clear()
        handle = job.save(2)
        assert job.local.writing.wait(DEADLINE_SECS)
    if phase == "mirroring":
        job.mirror.gate.clear()
        job.mirror.writing.clear()
        handle = job.save(2)
        handle.result(DEADLINE_SECS)
        assert job.mirror.writing.wait(DEADLINE_SECS)
        handle.result(DEADLINE_SECS)
        job.checkpointer.wait()
    before = [(tree(folder), leases(folder)) for folder in job.folders]
    for number in range(TIMES):
        way = WAYS[number % len(WAYS)]
        assert run_child(lambda: way(job)) == 3  # noqa: B023
    assert [(tree(folder), leases(folder)) for folder in job.folders] == before
    job.local.gate.set()
    job.mirror.gate.set()
    if phase != "idle":
        assert handle.result(DEADLINE_SECS) is not None
        job.awaits_copy()
    job.save(3).result(DEADLINE_SECS)
    job.awaits_copy()
    expected = [1, 3] if phase == "idle" else [1, 2, 3]
    assert steps_in(job.local) == steps_in(job.mirror) == expected


def test_the_workers_of_a_dataloader(job: Job) -> None:
    job.local.gate.clear()
    handle = job.save(1)
    before = [tree(folder) for folder in job.folders]
    data = TensorDataset(torch.arange(12.0))
    seen = []
    for _ in range(3):
        loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
        seen.append(torch.cat([batch for (batch,) in loader]).tolist())
    assert seen == [list(range(12))] * 3
    assert [tree(folder) for folder in job.folders] == before
    job.local.gate.set()
    assert handle.result(DEADLINE_SECS) is not None


SCRIPT = """
import os, sys, torch
from engine import Checkpointer

state = {"values": {"t": torch.zeros(100_000), "n": 0}}
with Checkpointer(sys.argv[1], state, mirror=sys.argv[2]) as ckpt:
    for step in range(1, 5):
        handle = ckpt.save(step)
        child = os.fork()
        if child == 0:
            sys.exit(3)  # leaves the `with`, runs every hook, and takes the interpreter down
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert handle.result(60.0).step == step
"""


def test_a_child_that_leaves_by_the_whole_way_of_python(tmp_path: Path) -> None:
    """`os.fork` and `sys.exit`, with a save and a copy to the mirror in flight."""
    local, mirror = tmp_path / "local", tmp_path / "mirror"
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(local), str(mirror)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "")
    assert steps_in(LocalStorage(local))[-1] == steps_in(LocalStorage(mirror))[-1] == 4


def test_what_a_child_is_told(job: Job) -> None:
    job.local.gate.clear()
    handle = job.save(1)
    checkpointer = job.checkpointer
    third = LocalStorage(job.folders[0].parent / "third")
    third.make_dir()
    lease = Lease.acquire(third, run_id="x")

    def ask() -> None:
        for call in (lambda: checkpointer.save(2), checkpointer.prepare, checkpointer.restore):
            with pytest.raises(ConfigError, match=f"belongs to process {os.getppid()}.*forked child"):
                call()
        with pytest.raises(SaveFailedError, match="a forked child cannot learn its outcome"):
            handle.result()
        with pytest.raises(LeaseLostError, match="forked child"):
            lease.check()
        lease.release()
        checkpointer.poll()
        checkpointer.wait()
        sys.exit(7)

    assert run_child(ask) == 7
    lease.check()
    with pytest.raises(DirectoryHeldError):
        Lease.acquire(third, run_id="y")
    lease.release()


def test_a_child_has_a_run_of_its_own(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def train() -> None:
        state = {"values": {"t": torch.ones(10)}}
        Checkpointer(tmp_path / "own", state).save(5)
        # Nobody closes it: the child's own exit hook does.

    def intrude() -> None:
        with pytest.raises(DirectoryHeldError, match=f"held by .*{os.getppid()}"):
            Checkpointer(job.folders[0], {"values": {}})
        sys.exit(8)

    assert run_child(intrude) == 8
    assert run_child(train) == 0
    assert steps_in(LocalStorage(tmp_path / "own")) == [5]


def test_a_mirror_that_a_child_closes_goes_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = job.checkpointer._directory.mirror
    assert isinstance(mirror, Mirror)

    def close() -> None:
        monkeypatch.setattr("engine.mirror.uploader.list_checkpoints", lambda *args: os._exit(5))
        sys.exit(9 if mirror.close() else 1)

    assert run_child(close) == 9
    job.save(1).result(DEADLINE_SECS)
    job.awaits_copy()


def test_the_exit_hook_forgets_what_the_parent_waits_for() -> None:
    called: list[int] = []
    forget = exit_module.call_at_exit(lambda: called.append(1) or os._exit(9))
    try:
        with exit_module._lock:  # as a thread of the parent may hold it at the moment of the fork
            assert run_child(lambda: exit_module.call_at_exit(lambda: os._exit(4))) == 4
            assert run_child(lambda: sys.exit(3)) == 3
    finally:
        forget()


def test_a_home_is_left_by_forking_only() -> None:
    home = Home()
    assert not home.left
    assert run_child(lambda: sys.exit(5 if home.left else 6)) == 5


def test_objects_that_are_gone_are_not_told() -> None:
    class Told:
        times = 0

        def forked(self) -> None:
            Told.times += 1

    kept, dropped = Told(), Told()
    in_child(kept.forked)
    in_child(dropped.forked)
    del dropped
    assert run_child(lambda: sys.exit(Told.times)) == 1
    assert Told.times == 0


def test_a_signal_to_a_child_is_not_the_trainers() -> None:
    """The pipe behind the wakeup descriptor is shared: terminating a child would stop the training."""
    preemption = Preemption(Request(25.0))
    preemption.install()
    ready, go = FORK.Event(), FORK.Event()

    def work() -> None:
        if signal.set_wakeup_fd(-1) != -1:
            os._exit(5)  # whatever the child opens under that number would get the numbers of its signals
        os.kill(os.getpid(), signal.SIGINT)  # as a Ctrl+C for the whole group
        os.kill(os.getpid(), signal.SIGUSR1)
        ready.set()
        go.wait(DEADLINE_SECS)

    try:
        child = FORK.Process(target=work)
        child.start()
        assert ready.wait(DEADLINE_SECS), "it died of a signal that is the parent's affair"
        child.terminate()
        child.join(DEADLINE_SECS)
        assert child.exitcode == -signal.SIGTERM
        assert preemption.signum is None
        os.kill(os.getpid(), signal.SIGUSR2)
        for _ in range(1000):
            if preemption.signum is not None:
                break
            threading.Event().wait(0.01)
        assert preemption.signum == signal.SIGUSR2, "the parent's own ones arrive"
    finally:
        preemption.uninstall()
