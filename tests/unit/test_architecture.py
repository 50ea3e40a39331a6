"""docs/architecture.md against the code: files, arrows, and what one save and one restore pass through."""

from __future__ import annotations

import itertools
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from engine import Checkpointer
from tests.unit.test_layering import ROOT, SOURCES, imports_of

ENGINE = ROOT / "engine"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
WAYS = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

MOST_FILES = {"save": 67, "restore": 73}
"""Distinct files of the engine in which one save, or one restore, runs a function. Lower it when
you can."""

SEAMS = ("storage/source.py", "ranks/agreement.py", "state/values.py")
"""Where a call may come back into a room that it has left: the page names them."""


def module(path: str) -> str:
    """The dotted name of a file that the page names."""
    return "engine." + path.removesuffix(".py").replace("/", ".")


def arrows() -> list[tuple[str, str]]:
    found = []
    for way in WAYS:
        for line in way.splitlines():
            files = re.findall(r"[a-z_0-9/]+\.py", line)
            found += list(itertools.pairwise(files))
            assert line.count("->") == len(files) - 1, line
    return found


def test_there_are_four_ways() -> None:
    assert len(WAYS) == 4
    assert len(arrows()) > 30


@pytest.mark.parametrize(("caller", "called"), sorted(set(arrows())))
def test_every_arrow_is_an_import(caller: str, called: str) -> None:
    name = module(caller)
    targets = {target for target, _ in imports_of(name, ENGINE / caller, SOURCES)}
    assert module(called) in targets, f"{caller} does not import {called}"


def test_every_room_and_file_is_named() -> None:
    named = set(re.findall(r"`([a-z_0-9]+(?:/|\.py))`", PAGE.partition("## A tensor")[0]))
    there = {f"{path.name}/" for path in ENGINE.iterdir() if (path / "__init__.py").exists()}
    assert {name for name in named if name.endswith("/")} - {"model/", "data/", "engine/"} == there
    top = {path.name for path in ENGINE.glob("*.py")} - {"__init__.py"}
    assert {name for name in named if name.endswith(".py")} == top
    for file in re.findall(r"`([a-z_0-9/]+\.py)`", PAGE):
        assert (ENGINE / file).exists() or (ROOT / file).exists(), file


class Trace:
    """The engine's files in which functions run, in all threads, and where calls re-enter a room."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.returns: set[str] = set()

    def run(self, work: Callable[[], Any]) -> None:
        before = sys.getprofile()
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            work()
        finally:
            sys.setprofile(before)
            threading.setprofile(None)  # type: ignore[arg-type]

    def _see(self, frame: FrameType, event: str, arg: object) -> None:
        prefix = f"{ENGINE}/"
        if event != "call" or not frame.f_code.co_filename.startswith(prefix):
            return
        self.files.add(frame.f_code.co_filename.removeprefix(prefix))
        way: list[str] = []
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_filename.startswith(prefix):
                way.append(caller.f_code.co_filename.removeprefix(prefix))
            caller = caller.f_back
        here = room(way[0])
        left = next((number for number, file in enumerate(way) if room(file) != here), len(way))
        if here in map(room, way[left:]):
            back = left + [room(file) for file in way[left:]].index(here)
            if not set(way[: back + 1]) & set(SEAMS):
                self.returns.add(" <- ".join(dict.fromkeys(way[: back + 1])))


def room(file: str) -> str:
    return file.partition("/")[0]


@pytest.mark.parametrize("way", ["save", "restore"])
def test_one_save_and_one_restore_pass_few_files_and_come_back_into_no_room(way: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    trace = Trace()
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.save(1).result()
        ckpt.wait()
        trace.run((lambda: (ckpt.save(2).result(), ckpt.wait())) if way == "save" else ckpt.restore)
    assert trace.returns == set()
    assert len(trace.files) <= MOST_FILES[way], sorted(trace.files)
    assert len(trace.files) > 20, "the trace sees nothing"
