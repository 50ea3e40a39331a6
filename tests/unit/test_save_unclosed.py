"""An unreferenced Checkpointer releases its directory; for a referenced one the error says where it is."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.errors import DirectoryHeldError
from engine.save import unclosed
from engine.save.unclosed import close_unreferenced, forgetful, wait_for_unreferenced
from engine.storage.local import LocalStorage
from tests.support.controlled import DEADLINE_SECS, ControlledStorage, use
from tests.support.tiers import steps_in

ROOT = Path(__file__).resolve().parents[2]


def state() -> dict[str, Any]:
    return {"values": {"t": torch.zeros(100), "n": 0}}


def test_a_dropped_one_finishes_its_save_and_lets_the_next_one_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = ControlledStorage(tmp_path / "run")
    use(monkeypatch, storage)
    first = Checkpointer("ignored", state())
    storage.gate.clear()
    handle = first.save(1)
    del first
    threading.Timer(0.1, storage.gate.set).start()
    with Checkpointer("ignored", state()) as second:
        assert handle.done(), "it waited for the save"
        second.save(2).result(DEADLINE_SECS)
    assert steps_in(storage) == [1, 2]


def test_one_that_only_a_cycle_holds(tmp_path: Path) -> None:
    class Cell:
        pass

    cell: Any = Cell()
    cell.itself, cell.checkpointer = cell, Checkpointer(tmp_path, state())
    gc.disable()  # it must be the new one that collects
    try:
        del cell
        Checkpointer(tmp_path, state()).close()
    finally:
        gc.enable()


def test_its_mirror_is_given_back_too(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path / "local", state(), mirror=tmp_path / "mirror")
    first.save(1).result(DEADLINE_SECS)
    del first
    with Checkpointer(tmp_path / "other", state(), mirror=tmp_path / "mirror"):
        assert steps_in(LocalStorage(tmp_path / "mirror")) == [1]


def test_one_that_is_held_says_where_it_was_made(tmp_path: Path) -> None:
    line = sys._getframe().f_lineno + 1
    first = Checkpointer(tmp_path, state())
    with pytest.raises(DirectoryHeldError, match=rf"made at {re.escape(__file__)}:{line}: close that"):
        Checkpointer(tmp_path, state())
    first.close()


def test_a_failed_start_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl+C in a notebook, while the Checkpointer looks at its directory."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("engine.save.run_directory.reap_abandoned", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Checkpointer(tmp_path, state())
    Checkpointer(tmp_path, state()).close()


@pytest.fixture
def no_collections() -> Iterator[None]:
    torch.optim.SGD(torch.nn.Linear(1, 1).parameters())  # the first one imports modules that leave cycles
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def never_saves(folder: Path, trained: dict[str, Any]) -> None:
    Checkpointer(folder, trained).close()


def saves_and_restores(folder: Path, trained: dict[str, Any]) -> None:
    with Checkpointer(folder, trained, mirror=folder / "mirror") as checkpointer:
        checkpointer.prepare()
        checkpointer.save(1).result(DEADLINE_SECS)
        checkpointer.restore()
        checkpointer.read()
        checkpointer.save(2)


def only_restores(folder: Path, trained: dict[str, Any]) -> None:
    with Checkpointer(folder, trained) as checkpointer:
        checkpointer.save(1)
    Checkpointer(folder, trained, read_only=True).restore()


def is_not_closed(folder: Path, trained: dict[str, Any]) -> None:
    Checkpointer(folder, trained).save(1)


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("use_it", [never_saves, saves_and_restores, only_restores, is_not_closed])
def test_the_state_goes_with_the_last_reference(
    tmp_path: Path, use_it: Callable[[Path, dict[str, Any]], None]
) -> None:
    """No reference cycle holds it until the garbage collector runs.

    That would be late for a model's memory. And a DataLoader's iterator that the collector finds in a cycle
    waits 5 s for each worker: the finalizer of its queue runs before `__del__`, which then reaches no worker.
    """
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    trained = {"model": model, "optimizer": optimizer, "n": {"n": 1}}
    left = weakref.ref(model), weakref.ref(optimizer)
    use_it(tmp_path, trained)
    while unclosed._closing:
        unclosed._closing.pop().join(DEADLINE_SECS)
    del trained, model, optimizer
    assert [reference() for reference in left] == [None, None]


def test_a_dropped_method_does_nothing() -> None:
    said: list[int] = []

    class Told:
        def tell(self, value: int) -> None:
            said.append(value)

    told = Told()
    call = forgetful(told.tell)
    call(1)
    del told
    call(2)
    assert said == [1]


def test_settling_waits_only_so_long() -> None:
    go = threading.Event()
    close_unreferenced(lambda: go.wait(DEADLINE_SECS) and None)
    assert wait_for_unreferenced(0.0)
    assert len(unclosed._closing) == 1
    go.set()
    assert wait_for_unreferenced(DEADLINE_SECS)
    assert not wait_for_unreferenced(0.0)


SCRIPT = """
import sys, threading, torch
from engine import Checkpointer
from engine.storage.local import LocalStorage

ending = threading.Event()
make_dir = LocalStorage.make_dir

def make_dir_late(storage, path=""):
    if path:
        ending.wait()
    make_dir(storage, path)

LocalStorage.make_dir = make_dir_late
state = {"values": {"t": torch.ones(10)}}
Checkpointer(sys.argv[1], state).save(1)
# Last in, first out: called before the save is waited for, and before the thread pools go.
threading._register_atexit(ending.set)
"""


def test_the_end_of_the_program_waits_for_a_dropped_one(tmp_path: Path) -> None:
    """Its save has written nothing by the time that the main thread ends."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert steps_in(LocalStorage(tmp_path / "run")) == [1]
