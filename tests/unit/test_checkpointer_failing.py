"""Saves that fail, wait, are skipped or forgotten: commits stay, and every failure is reported."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import Checkpointer, Retention
from engine.errors import (
    ConfigError,
    DirectoryHeldError,
    MemoryBudgetError,
    SaveFailedError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)
from engine.format.names import new_attempt
from engine.lease.lease import Lease
from engine.lease.process import ProcessIdentity
from engine.storage.local import LocalStorage
from engine.storage.system import System
from tests.support.controlled import DEADLINE_SECS, ControlledStorage, use
from tests.support.training import model, train

State = dict[str, Any]


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlledStorage:
    made = ControlledStorage(tmp_path / "run")
    use(monkeypatch, made)
    return made


def state() -> State:
    return {"values": {"n": 0, "t": torch.zeros(300_000)}}


def ids(checkpointer: Checkpointer) -> list[str]:
    assert all(item.status == "committed" for item in checkpointer.list()), "a failed attempt was left"
    return [item.id for item in checkpointer.list()]


def no_space(path: str) -> None:
    raise StorageFullError(f"could not write {path}: no space is left")


def bug(path: str) -> None:
    raise ZeroDivisionError("a bug in a writer")


class Disk(System):
    """Fails one kind of call with an errno."""

    def __init__(self) -> None:
        self.failing = ""
        self.code = 0

    def _maybe(self, call: str) -> None:
        if self.failing == call:
            raise OSError(self.code, os.strerror(self.code))

    def fallocate(self, fd: int, file_bytes: int) -> None:
        self._maybe("fallocate")
        super().fallocate(fd, file_bytes)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        self._maybe("pwrite")
        if self.failing == "short" and len(view) > 100_000:
            return super().pwrite(fd, view[:4096], offset)
        if self.failing == "nothing":
            return 0
        return super().pwrite(fd, view, offset)

    def fsync(self, fd: int) -> None:
        self._maybe("fsync")
        super().fsync(fd)

    def fsync_dir(self, path: str) -> None:
        self._maybe("fsync_dir")
        super().fsync_dir(path)


@pytest.mark.parametrize(
    ("failing", "code", "words"),
    [
        ("fallocate", errno.ENOSPC, "space"),
        ("pwrite", errno.ENOSPC, "space"),
        ("pwrite", errno.EDQUOT, "quota"),
        ("pwrite", errno.EIO, "input/output error"),
        ("nothing", 0, ""),
        ("fsync", errno.EIO, "input/output error"),
        ("fsync_dir", errno.EIO, "input/output error"),
    ],
)
def test_a_disk_that_fails_commits_nothing_and_the_next_save_works(
    failing: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    storage = ControlledStorage(tmp_path / "run", system=disk)
    use(monkeypatch, storage)
    with Checkpointer("ignored", state()) as checkpointer:
        first = checkpointer.save(1).result(DEADLINE_SECS)
        assert first is not None
        disk.failing, disk.code = failing, code
        handle = checkpointer.save(2)
        with pytest.raises(SaveFailedError) as caught:
            handle.result(DEADLINE_SECS)
        disk.failing = ""
        assert "step 2 was not saved" in str(caught.value)
        assert words in str(caught.value)
        assert ids(checkpointer) == [first.id]
        third = checkpointer.save(3).result(DEADLINE_SECS)
        assert third is not None
        assert ids(checkpointer) == [first.id, third.id]
        assert (third.sequence, third.parent) == (2, first.id)


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    disk.failing = "short"
    use(monkeypatch, ControlledStorage(tmp_path / "run", system=disk))
    source = state()
    source["values"]["t"].normal_()
    with Checkpointer("ignored", source) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
    other = state()
    with Checkpointer("ignored", other) as checkpointer:
        assert checkpointer.restore("latest") is not None
    assert torch.equal(other["values"]["t"], source["values"]["t"])


@pytest.mark.parametrize("break_it", [no_space, bug])
def test_any_exception_in_the_writer_fails_the_save(
    break_it: Callable[[str], None], storage: ControlledStorage
) -> None:
    with Checkpointer("ignored", state()) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
        before = ids(checkpointer)
        storage.broken = break_it
        with pytest.raises(SaveFailedError) as caught:
            checkpointer.save(2).result(DEADLINE_SECS)
        assert "rank 0" in str(caught.value)
        assert ids(checkpointer) == before
        assert checkpointer.failed_saves == 1
        storage.broken = lambda path: None
        checkpointer.save(3).result(DEADLINE_SECS)
        assert checkpointer.failed_saves == 0


def failing_save(checkpointer: Checkpointer, storage: ControlledStorage) -> Any:
    """A save that has failed by now, and that nobody has heard of."""
    storage.broken = no_space
    handle = checkpointer.save(7)
    assert checkpointer._saver is not None
    checkpointer._saver.wait(DEADLINE_SECS)
    storage.broken = lambda path: None
    assert handle.done()
    return handle


WAYS: dict[str, Callable[[Checkpointer, Any], Any]] = {
    "save": lambda checkpointer, handle: checkpointer.save(8),
    "poll": lambda checkpointer, handle: checkpointer.poll(),
    "wait": lambda checkpointer, handle: checkpointer.wait(),
    "close": lambda checkpointer, handle: checkpointer.close(),
    "handle": lambda checkpointer, handle: handle.result(DEADLINE_SECS),
    "exit": lambda checkpointer, handle: checkpointer.__exit__(None, None, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_failure_surfaces_at_the_next_call_once(way: str, storage: ControlledStorage) -> None:
    checkpointer = Checkpointer("ignored", state(), on_failure="raise")
    handle = failing_save(checkpointer, storage)
    with pytest.raises(SaveFailedError, match=r"step 7 was not saved.*no space"):
        WAYS[way](checkpointer, handle)
    checkpointer.poll()
    if way not in ("close", "exit"):
        record = checkpointer.save(9).result(DEADLINE_SECS)
        assert record is not None
        assert [item.step for item in checkpointer.list()] == [9], "the save that only raised saved nothing"
    checkpointer.close()
    with pytest.raises(SaveFailedError):
        handle.result(0)  # the handle always tells


def test_a_failure_in_the_block_is_not_covered_by_a_failed_save(
    storage: ControlledStorage, caplog: pytest.LogCaptureFixture
) -> None:
    def loop() -> None:
        with Checkpointer("ignored", state()) as checkpointer:
            failing_save(checkpointer, storage)
            raise KeyError("the loop's own")

    with pytest.raises(KeyError, match="the loop's own"):
        loop()
    assert "step 7 was not saved" in caplog.text


def test_nothing_to_poll_is_no_error(storage: ControlledStorage) -> None:
    with Checkpointer("ignored", state()) as checkpointer:
        checkpointer.poll()
        checkpointer.wait()
        storage.gate.clear()
        handle = checkpointer.save(1)
        checkpointer.poll()
        assert not handle.done()
        with pytest.raises(TimeoutError):
            handle.result(0)
        with pytest.raises(TimeoutError):
            checkpointer.wait(0)
        storage.gate.set()
        handle.result(DEADLINE_SECS)


def test_waiting_is_the_default_when_the_writer_is_busy(storage: ControlledStorage) -> None:
    source = state()
    with Checkpointer("ignored", source) as checkpointer:
        storage.gate.clear()
        first = checkpointer.save(1)
        assert storage.writing.wait(DEADLINE_SECS)
        opened: list[bool] = []

        def open_the_gate() -> None:
            opened.append(first.done())
            storage.gate.set()

        opener = threading.Timer(0.05, open_the_gate)  # the only way past the wait below
        opener.start()
        second = checkpointer.save(2)
        opener.join()
        assert opened == [False]
        assert first.done()
        one, two = first.result(0), second.result(DEADLINE_SECS)
        assert one is not None
        assert two is not None
        assert (one.sequence, two.sequence) == (1, 2)


def test_skip_skips_and_says_so(storage: ControlledStorage) -> None:
    events: list[State] = []
    with Checkpointer("ignored", state(), busy="skip", on_event=events.append) as checkpointer:
        storage.gate.clear()
        first = checkpointer.save(1)
        assert storage.writing.wait(DEADLINE_SECS)
        second = checkpointer.save(2)
        assert second.skipped
        assert second.done()
        assert second.result(0) is None
        assert not first.skipped
        storage.gate.set()
        assert first.result(DEADLINE_SECS) is not None
        checkpointer.wait()  # clean-up after the commit is part of being busy
        third = checkpointer.save(3)
        assert not third.skipped
        third.result(DEADLINE_SECS)
        assert [item.step for item in checkpointer.list()] == [1, 3]
        assert checkpointer.failed_saves == 0
    assert [event["step"] for event in events if event["event"] == "save_started"] == [1, 3]


def test_a_forgotten_checkpointer_still_finishes_at_exit(tmp_path: Path) -> None:
    """Also when nothing has been written by the time that the main thread ends."""
    code = f"""
        import concurrent.futures.thread as futures, threading, torch
        from engine import Checkpointer
        from engine.storage.local import LocalStorage

        closing = threading.Event()
        make_dir, close = LocalStorage.make_dir, Checkpointer.close

        def make_dir_late(storage, path=""):
            while path and not (closing.is_set() or futures._shutdown):
                closing.wait(0.01)
            make_dir(storage, path)

        def note_closing(checkpointer, *mirror_patience):
            closing.set()
            close(checkpointer, *mirror_patience)

        LocalStorage.make_dir, Checkpointer.close = make_dir_late, note_closing

        def train():
            checkpointer = Checkpointer({str(tmp_path)!r}, {{"values": {{"t": torch.ones(2_000_000)}}}})
            checkpointer.save(5)
        train()
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=True
    )
    assert ran.stderr == ""
    with Checkpointer(tmp_path, {"values": {}}) as checkpointer:  # and its lease is free
        assert [item.step for item in checkpointer.list() if item.status == "committed"] == [5]


def test_a_forgotten_failure_is_logged_at_exit(tmp_path: Path) -> None:
    code = f"""
        import logging, torch
        logging.basicConfig(level="ERROR")
        from engine import Checkpointer
        from engine.storage.local import LocalStorage
        def broken(*args, **kwargs):
            raise OSError(28, "no space left on device")
        LocalStorage.write_shard = broken
        Checkpointer({str(tmp_path)!r}, {{"values": {{"t": torch.ones(2)}}}}).save(5)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=True
    )
    assert "step 5 was not saved" in ran.stderr
    assert "no space" in ran.stderr


def test_over_the_memory_budget_both_figures_are_named(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, state(), memory_budget_bytes=1_000_000) as checkpointer:
        for step in (1, 2):
            with pytest.raises(MemoryBudgetError) as caught:
                checkpointer.save(step)
            assert "1,000,000 bytes" in str(caught.value)
            assert "1,2" in str(caught.value), "the 1.2 MB of the state"
        assert checkpointer.list() == []


def test_the_budget_is_enough_when_it_is_exactly_enough(tmp_path: Path) -> None:
    events: list[State] = []
    with Checkpointer(tmp_path / "one", state(), on_event=events.append) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
    size = next(event["bytes"] for event in events if event["event"] == "save_snapshotted")
    padded = -(-size // 4096) * 4096
    with Checkpointer(tmp_path / "two", state(), memory_budget_bytes=padded) as checkpointer:
        checkpointer.save(1).result(DEADLINE_SECS)
    checkpointer = Checkpointer(tmp_path / "three", state(), memory_budget_bytes=padded - 1)
    with checkpointer, pytest.raises(MemoryBudgetError):
        checkpointer.save(1)


def test_retention_runs_after_each_commit(tmp_path: Path) -> None:
    losses = [5.0, 1.0, 4.0, 3.0, 3.5, 3.2]
    with Checkpointer(tmp_path, state(), retention=Retention(rolling=2, best=1, epochs=True)) as checkpointer:
        for step, loss in enumerate(losses):
            reasons = ("epoch",) if step == 2 else ("interval",)
            checkpointer.save(step, epoch=step // 3, metrics={"val_loss": loss}, reasons=reasons)
        checkpointer.wait()
        assert [item.step for item in checkpointer.list()] == [1, 2, 4, 5]


def test_no_retention_keeps_everything(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, state(), retention=None) as checkpointer:
        for step in range(12):
            checkpointer.save(step)
        checkpointer.wait()
        assert len(checkpointer.list()) == 12


def test_clean_up_that_fails_fails_no_save(
    storage: ControlledStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(path: str) -> None:
        raise StorageDeniedError("not allowed to delete")

    with Checkpointer(
        "ignored", state(), retention=Retention(rolling=1, best=0, epochs=False)
    ) as checkpointer:
        monkeypatch.setattr(storage, "delete_file", denied)
        for step in range(4):
            assert checkpointer.save(step).result(DEADLINE_SECS) is not None
        checkpointer.wait()
        assert len(checkpointer.list()) == 4
        monkeypatch.undo()
        use(monkeypatch, storage)
    assert "not allowed to delete" in caplog.text


def test_a_listener_that_fails_disturbs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def listener(event: State) -> None:
        raise ValueError(f"cannot cope with {event['event']}")

    with Checkpointer(tmp_path, state(), on_event=listener) as checkpointer:
        assert checkpointer.save(1).result(DEADLINE_SECS) is not None
        assert checkpointer.restore("latest") is not None
    for event in ("save_started", "save_snapshotted", "save_committed", "restored"):
        assert f"cannot cope with {event}" in caplog.text


def test_events_tell_where_the_time_went(tmp_path: Path) -> None:
    events: list[State] = []
    with Checkpointer(tmp_path, state(), on_event=events.append) as checkpointer:
        record = checkpointer.save(3, reasons=("interval", "best")).result(DEADLINE_SECS)
    assert record is not None
    assert [event["event"] for event in events] == ["save_started", "save_snapshotted", "save_committed"]
    assert all(event["step"] == 3 for event in events)
    done = events[-1]
    assert done["reasons"] == ["interval", "best"]
    assert done["path"] == record.path
    assert done["bytes"] == record.bytes
    assert done["secs"] >= done["blocked_secs"] >= 0
    causes = {"wait", "capture", "copy", "write", "digest", "fsync", "index", "receipts", "commit"}
    assert set(done["secs_by_cause"]) == causes


def test_the_event_of_a_failed_save_carries_its_cause(storage: ControlledStorage) -> None:
    events: list[State] = []
    with Checkpointer("ignored", state(), on_event=events.append) as checkpointer:
        handle = failing_save(checkpointer, storage)
        with pytest.raises(SaveFailedError):
            handle.result(0)
    failed = events[-1]
    assert failed["event"] == "save_failed"
    assert failed["step"] == 7
    assert "no space" in failed["cause"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_threads_and_descriptors_return_to_where_they_were(storage: ControlledStorage) -> None:
    network = model()
    source = {"model": network, "optimizer": torch.optim.AdamW(network.parameters()), **state()}

    def once(broken: bool) -> None:
        train(network, source["optimizer"])
        storage.broken = no_space if broken else lambda path: None
        with Checkpointer("ignored", source) as checkpointer:
            try:
                checkpointer.save(1).result(DEADLINE_SECS)
                checkpointer.restore("latest")
            except SaveFailedError:
                assert broken

    once(False)  # what is opened once and kept, by torch and by us
    gc.collect()
    threads, files = threading.active_count(), open_files()
    for number in range(4):
        once(broken=number % 2 == 1)
    gc.collect()
    assert threading.active_count() == threads
    assert open_files() == files


def test_a_closed_checkpointer_cannot_save_and_closes_twice(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, state())
    checkpointer.save(1)
    checkpointer.close()
    checkpointer.close()
    with pytest.raises(SaveFailedError, match="closed"):
        checkpointer.save(2)
    assert [item.step for item in checkpointer.list()] == [1]


def test_closing_lets_the_optimizer_go(tmp_path: Path) -> None:
    network = model()
    optimizer = torch.optim.AdamW(network.parameters())
    checkpointer = Checkpointer(tmp_path, {"model": network, "optimizer": optimizer})
    checkpointer.save(1).result(DEADLINE_SECS)
    checkpointer.close()
    assert not optimizer._optimizer_step_pre_hooks


def test_the_directory_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, state()), pytest.raises(DirectoryHeldError, match=str(os.getpid())):
        Checkpointer(tmp_path, state())
    Checkpointer(tmp_path, state()).close()


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        Checkpointer(tmp_path / "file" / "run", state())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"busy": "later"}, "busy is 'later'"),
        ({"timeout_secs": 0}, "timeout_secs is 0"),
        ({"overlap": True}, "overlap is True"),
    ],
)
def test_arguments_that_cannot_work(arguments: State, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        Checkpointer(tmp_path, state(), **arguments)
    assert not list(tmp_path.iterdir()), "nothing was touched"


@pytest.mark.parametrize(("step", "reasons"), [(-1, ("manual",)), (1, ()), (1, ("because",))])
def test_saves_that_make_no_sense(step: int, reasons: tuple[str, ...], tmp_path: Path) -> None:
    with Checkpointer(tmp_path, state()) as checkpointer:
        with pytest.raises(ConfigError):
            checkpointer.save(step, reasons=reasons)
        checkpointer.save(1).result(DEADLINE_SECS)


def test_a_config_that_is_not_json_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.lr\.peak is a builtins\.object"):
        Checkpointer(tmp_path, state(), config={"lr": {"peak": object()}})
    assert not list(tmp_path.iterdir())


def test_an_attempt_of_a_killed_run_is_removed_by_the_next_one(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, state()) as checkpointer:
        record = checkpointer.save(1).result(DEADLINE_SECS)
    assert record is not None
    gone = replace(ProcessIdentity.current(), start_time=1)
    Lease.acquire(LocalStorage(tmp_path), run_id="killed", process=gone)
    attempt = tmp_path / new_attempt(9, "killed", "its first")
    attempt.mkdir()
    (attempt / "shard-00000.safetensors").write_bytes(b"half")
    with Checkpointer(tmp_path, state()) as checkpointer:
        assert not attempt.exists()
        assert ids(checkpointer) == [record.id]


def test_a_start_that_fails_leaves_the_directory_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("engine.save.assembly.overlap_stream", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            Checkpointer(tmp_path, state())
    Checkpointer(tmp_path, state()).close()


def test_a_start_that_is_refused_leaves_the_optimizer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        """Enough of one for hooks to be set."""

    monkeypatch.setattr("engine.save.assembly.overlap_stream", lambda *args: (Stream(), "overlapped"))
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    with Checkpointer(tmp_path, {"model": net}):
        with pytest.raises(DirectoryHeldError):
            Checkpointer(tmp_path, {"model": net, "optimizer": optimizer})
        assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("which", ["directory", "mirror"])
def test_an_address_that_cannot_be_written_down_is_refused(which: str, tmp_path: Path) -> None:
    """No rank could tell another one where the checkpoint lies: the save would commit, and then fail."""
    odd = str(tmp_path / "caf\udce9")
    given = {"directory": tmp_path / "run", "mirror": tmp_path / "second"} | {which: odd}
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        Checkpointer(given["directory"], state(), mirror=given["mirror"])
    assert not any(tmp_path.iterdir())


def test_whole_numbers_of_any_kind_are_taken_and_others_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, state()) as checkpointer:
        for step in (1.0, "1", None):
            with pytest.raises(ConfigError, match=f"^step is {step!r}: it must be a whole number"):
                checkpointer.save(step)  # type: ignore[arg-type]
        given: State = {"step": np.int64(3), "epoch": torch.tensor(1), "tokens": np.uint32(7)}
        record = checkpointer.save(**given).result(DEADLINE_SECS)
        assert record is not None
        assert (record.step, record.epoch, record.tokens) == (3, 1, 7)
        assert ids(checkpointer) == [record.id]
