"""Saves that end, saves that are flushed, and the modes by name."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.cases.modes.base import Mode, Save
from bench.cases.modes.fsynced import checkpoint_entries, flush_tree, save_and_flush
from bench.cases.modes.registry import HOLDFAST, LOADS, SAVE_REFERENCE, SAVES, mode_class
from bench.cases.save.program import parse
from bench.harness.ranks import describe


class Recording(Mode):
    """A mode whose save ends when the test says so."""

    name = "recording"
    flushes = False

    def __init__(self, directory: Path, rank: int = 0) -> None:
        context: Any = SimpleNamespace(directory=directory, rank=rank, timeout_secs=5.0)
        super().__init__(context)
        self.inner: Save | None = None
        self.sync = True
        self.error: Exception | None = None

    def save(self, number: int) -> Save:
        self.inner = Save(self.path(number))
        if self.sync:
            self.inner.end(self.error)
        return self.inner


def test_a_save_ends_once() -> None:
    save = Save(Path("x"))
    assert not save.over
    with pytest.raises(TimeoutError):
        save.wait(0)
    save.end()
    ended_at = save.ended_at
    save.end(RuntimeError("too late"))
    assert (save.over, save.error, save.ended_at) == (True, None, ended_at)
    save.wait(0)


@pytest.mark.parametrize("error", [None, OSError("disk full")])
def test_a_save_follows_a_future(error: Exception | None) -> None:
    future: Future[None] = Future()
    save = Save(Path("x")).follow(future)
    assert not save.over
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
    assert save.over
    assert save.error is error


def test_a_flush_follows_the_save(tmp_path: Path) -> None:
    mode = Recording(tmp_path)
    flushed: list[Path] = []
    assert save_and_flush(mode, 3, flushed.append).over
    assert flushed == [tmp_path / "save-00003"]


def test_a_flush_beside_training_waits_for_the_save(tmp_path: Path) -> None:
    mode = Recording(tmp_path)
    mode.sync = False
    flushed: list[Path] = []
    save = save_and_flush(mode, 1, flushed.append)
    assert not save.over
    assert flushed == []
    assert mode.inner is not None
    mode.inner.end()
    save.wait(5)
    assert flushed == [tmp_path / "save-00001"]
    assert save.ended_at >= mode.inner.ended_at


def test_what_failed_is_not_flushed_and_a_failed_flush_fails_the_save(tmp_path: Path) -> None:
    mode = Recording(tmp_path)
    mode.error = OSError("disk full")
    flushed: list[Path] = []
    assert save_and_flush(mode, 1, flushed.append).error is mode.error
    assert flushed == []
    mode.error = None
    save = save_and_flush(mode, 2)  # there are no files: the flush fails
    assert isinstance(save.error, FileNotFoundError)


def test_only_rank_0_flushes(tmp_path: Path) -> None:
    mode = Recording(tmp_path, rank=1)
    flushed: list[Path] = []
    assert save_and_flush(mode, 1, flushed.append) is mode.inner
    assert flushed == []


def test_files_are_flushed_before_the_directories_that_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "save"
    (root / "a" / "b").mkdir(parents=True)
    for name in ("a/b/one", "a/two", "three"):
        (root / name).write_bytes(b"x")
    order = [entry.relative_to(tmp_path).as_posix() for entry in checkpoint_entries(root)]
    assert set(order[:3]) == {"save/a/b/one", "save/a/two", "save/three"}
    assert order[3:] == ["save/a/b", "save/a", "save", "."]
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    flush_tree(root)
    assert synced == [str(entry) for entry in checkpoint_entries(root)]


def test_modes_are_chosen_in_the_order_of_the_tables() -> None:
    assert parse(["--modes", HOLDFAST, "none", "torch.save"]).modes == ("torch.save", HOLDFAST)
    assert parse([]).modes == SAVES
    assert SAVE_REFERENCE in SAVES


@pytest.mark.parametrize(
    "name", [name for name in SAVES if name not in ("torch_checkpointing", "torchsnapshot")]
)
def test_every_mode_can_be_loaded_under_its_own_name(name: str) -> None:
    mode = mode_class(name)
    assert mode.name == name
    assert mode.flushes == (name != "torch.save")


@pytest.mark.parametrize("name", [name for name in LOADS if name != "torch_checkpointing"])
def test_every_row_that_restores_has_a_mode_that_can(name: str) -> None:
    assert mode_class(name).load is not Mode.load


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no"), "ValueError: no"),
        (KeyError(), "KeyError"),
        (RuntimeError("Traceback:\n  File x\nOSError: full\n"), "RuntimeError: Traceback: ... OSError: full"),
    ],
)
def test_errors_fit_a_line(error: Exception, text: str) -> None:
    assert describe(error) == text
