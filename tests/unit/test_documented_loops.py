"""The training loops of the README and the guide, run as they stand there, stopped, and run again."""

from __future__ import annotations

import inspect
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import Checkpointer
from engine.save.outcomes import SaveHandle
from tests.documents import GUIDE, README, blocks, spans

Names = dict[str, Any]


class Stopped(Exception):
    """What the test stops a loop with."""


class Runner:
    """Runs a snippet in a folder, as a new process would: its global generators start somewhere else."""

    def __init__(self, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code = compile(text, "snippet", "exec")
        self.monkeypatch = monkeypatch
        folder.mkdir()
        monkeypatch.chdir(folder)
        self.starts = 0

    def run(self, stop_after: int | None = None, **given: Any) -> Names:
        """The names that it leaves. It is stopped in the step after the save of `stop_after`."""
        self.starts += 1
        torch.manual_seed(1000 + self.starts)
        random.seed(self.starts)
        np.random.seed(self.starts)
        names: Names = dict(given)
        real = Checkpointer.save

        def save(checkpointer: Checkpointer, step: int, **more: Any) -> SaveHandle:
            handle = real(checkpointer, step, **more)
            if step == stop_after:
                handle.result(60.0)
                raise Stopped
            return handle

        with self.monkeypatch.context() as patched:
            patched.setattr(engine.checkpointer.Checkpointer, "save", save)
            try:
                exec(self.code, names)
            except Stopped:
                assert stop_after is not None
        return names


def weights(names: Names) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in names["model"].state_dict().values()]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Runner]:
    return lambda text, folder: Runner(text, tmp_path / folder, monkeypatch)


def ends_alike(runner: Callable[[str, str], Runner], text: str, *stops: int, **given: Any) -> None:
    """A run that is stopped and carried on at these steps ends with the weights of one that is not."""
    undisturbed = weights(runner(text, "undisturbed").run(**given))
    broken = runner(text, "broken")
    for stop in stops:
        broken.run(stop, **given)
    carried_on = weights(broken.run(**given))
    assert all(torch.equal(one, other) for one, other in zip(undisturbed, carried_on, strict=True))


def test_the_readme_resumes_exactly_dropout_included(runner: Callable[[str, str], Runner]) -> None:
    """Within an epoch, after a save of another one, and twice."""
    (text,) = blocks(README, "python")
    assert "Dropout" in text
    assert "DataLoader" in text
    ends_alike(runner, text, 20, 80)


def test_without_a_generator_of_its_own_a_loader_does_not(runner: Callable[[str, str], Runner]) -> None:
    """So that the test above shows something, and the sentence below the loop is true."""
    (text,) = blocks(README, "python")
    careless = text.replace("shuffle=True, generator=order", "shuffle=False")
    assert careless != text
    with pytest.raises(AssertionError):
        ends_alike(runner, careless, 20)


def of_the_guide(word: str) -> str:
    (text,) = [block for block in blocks(GUIDE, "python") if word in block]
    return text


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_the_guides_stateful_loader(runner: Callable[[str, str], Runner]) -> None:
    """Stopped within the first epoch, and in a later one."""
    ends_alike(runner, of_the_guide("StatefulDataLoader"), 7, 28)


def test_the_guides_batch_that_is_drawn_ahead(runner: Callable[[str, str], Runner]) -> None:
    ends_alike(runner, of_the_guide("ahead"), 10, 30)


def test_the_guides_loop_that_a_signal_stops(runner: Callable[[str, str], Runner]) -> None:
    def batches() -> Iterator[int]:
        yield from (1, 2)
        os.kill(os.getpid(), signal.SIGUSR1)
        yield from (3, 4)

    seen: list[int] = []
    given = {"loader": batches(), "state": {"n": {"seen": seen}}, "step": 0, "train_step": seen.append}
    names = runner(of_the_guide("StopSignals"), "stopped").run(**given)
    assert seen == [1, 2, 3], "the batch that was fetched when the signal came is trained on"
    record = names["ckpt"].last_committed
    assert (record.step, record.reasons) == (3, ("signal",))


def test_a_batch_ahead_that_is_in_no_state_is_lost(runner: Callable[[str, str], Runner]) -> None:
    """So that the sentence before the loop is true."""
    careless = of_the_guide("ahead").replace(', "ahead": ahead', "")
    with pytest.raises(AssertionError):
        ends_alike(runner, careless, 10)


CALL = re.compile(r"^(?:ckpt\.)?(\w+)\((.*)\)$")


def unknown_keywords(document: Path) -> tuple[list[str], int]:
    """(keywords that no such parameter has, how many were looked at) in the prose's calls."""
    known: dict[str, Callable[..., Any]] = {name: getattr(engine, name) for name in engine.__all__}
    known |= {name: method for name, method in vars(Checkpointer).items() if inspect.isfunction(method)}
    unknown, looked_at = [], 0
    for span in spans(document):
        call = CALL.match(span)
        if call is None or call[1] not in known:
            continue
        given = re.findall(r"(?:^|, )(\w+)=", call[2])
        parameters = inspect.signature(known[call[1]]).parameters
        unknown += [f"{span}: {name}" for name in given if name not in parameters]
        looked_at += len(given)
    return unknown, looked_at


@pytest.mark.parametrize("document", [README, GUIDE], ids=lambda path: path.name)
def test_every_keyword_that_the_prose_gives_exists(document: Path) -> None:
    unknown, looked_at = unknown_keywords(document)
    assert unknown == []
    assert looked_at >= 3


def test_a_keyword_that_does_not_exist_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Call `ckpt.restore(selector, renamed={a: b}, strict=)` or `other(x=1)`.")
    assert unknown_keywords(page) == (["ckpt.restore(selector, renamed={a: b}, strict=): renamed"], 2)
