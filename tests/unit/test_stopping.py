"""Signals end a user's own loop between two steps, with a save, whatever its workers do."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from engine import ReshardableLoader, StopSignals
from engine import stopping as stopping_module
from engine.stopping import SIGNALS, shield_worker

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECS = 60.0


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


@pytest.fixture
def stop() -> Iterator[StopSignals]:
    before = [signal.getsignal(signum) for signum in (*SIGNALS, signal.SIGCHLD)]
    with StopSignals() as made:
        yield made
    after = [signal.getsignal(signum) for signum in SIGNALS]
    assert after == before[: len(SIGNALS)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2], ids=str)
def test_each_signal_ends_the_loop_before_the_next_batch(stop: StopSignals, signum: signal.Signals) -> None:
    source = iter(range(10))
    seen = []
    for batch in stop.batches(source):
        seen.append(batch)
        if batch == 3:
            os.kill(os.getpid(), signum)
    assert seen == [0, 1, 2, 3]
    assert stop.requested
    assert stop.signum == signum
    assert next(source) == 4, "no batch is lost"


def test_without_a_signal_the_loop_ends_with_the_loader(stop: StopSignals) -> None:
    assert list(stop.batches([1, 2])) == [1, 2]
    assert not stop.requested


def test_a_second_signal_that_is_meant_has_its_usual_effect(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(stopping_module.time, "monotonic", lambda: now[0])
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += 2.0
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, stop._receive)


def test_all_ranks_stop_when_one_was_told(stop: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def all_reduce(told: torch.Tensor, op: object) -> None:
        assert op == dist.ReduceOp.MAX
        asked.append(int(told))
        if len(asked) == 3:
            told.fill_(1)

    monkeypatch.setattr(stopping_module, "_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert list(stop.batches(range(9))) == [0, 1]
    assert asked == [0, 0, 0]
    assert stop.requested
    assert stop.signum is None


class Fails:
    """A loader that raises as a DataLoader whose worker has died."""

    def __init__(self, error: Exception, before: Callable[[], object] = lambda: None) -> None:
        self.error, self.before = error, before

    def __iter__(self) -> Iterator[int]:
        yield 0
        self.before()
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) exited unexpectedly"),
        ConnectionResetError(104, "pid 7"),
        EOFError("pid 7"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_dead_worker_is_an_error_unless_a_signal_explains_it(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """One that dies while it hands a batch over leaves half of it in the pipe."""
    monkeypatch.setattr(stopping_module, "ARRIVAL_SECS", 0.05)
    with pytest.raises(type(error), match="pid 7"):
        list(stop.batches(Fails(error)))
    told = Fails(error, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert list(stop.batches(told)) == [0]
    assert "pid 7" in caplog.text


def test_with_several_ranks_it_is_an_error_all_the_same(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are in their step by now, and wait for this rank there."""
    monkeypatch.setattr(stopping_module, "_world_size", lambda: 2)
    monkeypatch.setattr(stop, "agree", lambda: False)
    told = Fails(RuntimeError("pid 7"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RuntimeError, match="pid 7"):
        list(stop.batches(told))


def test_what_the_handler_of_a_dead_worker_raises_waits_for_the_end_of_the_step(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(signum: int, frame: object) -> None:
        raise RuntimeError("worker is killed by signal")

    monkeypatch.setattr(stopping_module, "ARRIVAL_SECS", 0.05)
    ended = []

    def train() -> None:
        for batch in stop.batches([1, 2, 3]):
            os.kill(os.getpid(), signal.SIGCHLD)
            ended.append(batch)

    before = signal.signal(signal.SIGCHLD, raises)
    try:
        with pytest.raises(RuntimeError, match="killed by signal"):
            train()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert ended == [1], "the step was finished"


def one_worker(stop: StopSignals) -> tuple[Any, int]:
    init = functools.partial(shield_worker, init=None)
    iterator = iter(DataLoader(Numbers(), num_workers=1, worker_init_fn=init, multiprocessing_context="fork"))
    next(iterator)
    (worker,) = iterator._workers  # type: ignore[attr-defined]
    return iterator, worker.pid


def test_a_shielded_worker_outlives_signals_to_the_group_and_obeys_its_parent(stop: StopSignals) -> None:
    iterator, pid = one_worker(stop)
    for signum in SIGNALS:
        subprocess.run(["kill", f"-{int(signum)}", str(pid)], check=True)  # from another process
    for _ in range(100):
        next(iterator)
    worker = iterator._workers[0]
    os.kill(pid, signal.SIGTERM)  # as terminate() does
    worker.join(DEADLINE_SECS)
    assert worker.exitcode == 0


def test_the_users_own_init_still_runs(stop: StopSignals, tmp_path: Path) -> None:
    def init(number: int) -> None:
        (tmp_path / f"worker-{number}").touch()

    loader = DataLoader(
        Numbers(), batch_size=500, num_workers=2, worker_init_fn=init, multiprocessing_context="fork"
    )
    for _ in range(2):
        assert len(list(stop.batches(loader))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worker-0", "worker-1"]
    assert loader.worker_init_fn.keywords == {"init": init}, "wrapped once"  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_the_workers_of_a_wrapped_loader_are_shielded(stop: StopSignals) -> None:
    sampler: Any = StatefulDistributedSampler(Numbers(), 1, 0)
    inner = StatefulDataLoader(Numbers(), 500, sampler=sampler, num_workers=1)
    assert len(list(stop.batches(ReshardableLoader(inner)))) == 2
    assert inner.worker_init_fn.func is shield_worker  # type: ignore[union-attr]


SCRIPT = """
import os, sys
import torch
from torch.utils.data import DataLoader, Dataset
from engine import Checkpointer, StopSignals, stopping

stopping.ARRIVAL_SECS = 60.0  # however busy the machine is

class Numbers(Dataset):
    def __len__(self): return 10**7
    def __getitem__(self, index): return torch.tensor([float(index)])

state = {"model": torch.nn.Linear(1, 1)}
with StopSignals() as stop, Checkpointer(sys.argv[1], state) as ckpt:
    step = 0
    for batch in stop.batches(DataLoader(Numbers(), batch_size=2, num_workers=2)):
        state["model"](batch)
        step += 1
        if step == 3:
            print(*open(f"/proc/self/task/{os.getpid()}/children").read().split(), flush=True)
    if stop.requested:
        ckpt.save(step, reasons=("signal",))
print(step, stop.signum)
"""


def wait_until_gone(pid: int) -> None:
    """It may stay as a zombie until its parent asks."""
    for _ in range(6000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except FileNotFoundError:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["the whole group", "workers first"])
def test_a_signal_to_the_whole_group_saves_the_step_reached(tmp_path: Path, how: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) >= 2
        if how == "workers first":
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            for pid in workers:
                wait_until_gone(pid)
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGTERM)
        out, errors = process.communicate(timeout=DEADLINE_SECS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    step, signum = (int(word) for word in out.split())
    assert signum == signal.SIGTERM
    (manifest,) = (tmp_path / "run").glob("*/manifest.json")
    saved = json.loads(manifest.read_bytes())
    assert (saved["step"], saved["reasons"]) == (step, ["signal"])
