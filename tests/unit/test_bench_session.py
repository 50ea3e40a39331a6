"""The whole measurement in one process on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.cases.modes.base import Mode, Save
from bench.cases.modes.registry import mode_class
from bench.cases.save import session as save_session
from bench.cases.save import window
from bench.cases.save.figures import summarise
from bench.cases.save.program import parse
from bench.cases.save.session import COPY_PASSES, NONE_WINDOWS, RAW_WINDOWS, WRITE_PASSES, SaveSession
from bench.harness.floors import Floors, state_tensors
from bench.harness.training import Training
from engine.run.world import World
from model.config import GPT2Config

TINY = GPT2Config(n_layer=1, n_head=1, n_embd=32, vocab_size=64, block_size=64)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take seconds where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_gate_lets_a_mode_hold_the_optimizer_back() -> None:
    training = Training(TINY, World(), CPU, dp_replicate=1, tokens=8, seed=1)
    (weight,) = [p for p in training.job.parameters if p.shape == (64, 32)][:1]
    seen: list[tuple[str, float]] = []
    caller: Any = SimpleNamespace(
        before_step=lambda: seen.append(("before", weight.sum().item())),
        after_step=lambda: seen.append(("after", weight.sum().item())),
    )
    training.gate.begin(caller)
    training.step()
    assert training.gate.end() is None
    assert training.gate.waited_secs > 0
    assert [name for name, _ in seen] == ["before", "after"]
    assert seen[0][1] != seen[1][1]
    training.step()
    assert len(seen) == 2


@pytest.mark.parametrize("parts", [1, 3])
def test_floors_move_every_byte_of_the_state_once(tmp_path: Path, parts: int) -> None:
    training = Training(TINY, World(), CPU, dp_replicate=1, tokens=8, seed=1)
    training.step()
    tensors = state_tensors(training.job.model, training.job.optimizer)
    flat = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors])
    copied = []
    for part in range(parts):
        floors = Floors(tensors, part, parts, tmp_path)
        floor = floors.copy(0)
        copied.append(floors._buffer.clone())
        assert floors.write(0).rank_bytes == floor.rank_bytes == len(copied[-1])
    assert torch.equal(torch.cat(copied), flat)
    assert list(tmp_path.iterdir()) == []


def test_a_floor_writes_what_it_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = Floors([torch.arange(5000, dtype=torch.float32)], 0, 1, tmp_path)
    floors.copy(0)
    monkeypatch.setattr(Path, "unlink", lambda path, **_: None)
    floors.write(0)
    (file,) = tmp_path.iterdir()
    content = torch.frombuffer(bytearray(file.read_bytes()[:20000]), dtype=torch.float32)
    assert torch.equal(content, torch.arange(5000, dtype=torch.float32))


class Breaking(Mode):
    """Breaks at its third save."""

    name = "torchsnapshot"

    def save(self, number: int) -> Save:
        if number >= 6:
            raise OSError("the third save")
        save = Save(self.path(number))
        save.end()
        return save


def test_a_run_measures_every_mode_and_outlives_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_or_break(name: str) -> Any:
        if name == "torch_checkpointing":
            raise ImportError("there is no such module")
        return Breaking if name == "torchsnapshot" else mode_class(name)

    monkeypatch.setattr(save_session, "mode_class", load_or_break)
    # It waits for whatever else writes to this disk, too.
    monkeypatch.setattr(window, "sync_file_system", lambda directory: None)
    modes = ["torch.save", "dcp.async_save", "torch_checkpointing", "torchsnapshot", "holdfast"]
    flags = ["--state", "1M", "--repeats", "2", "--steps", "2", "--step_secs", "0.001", "--growth_saves", "3"]
    options = parse([*flags, "--growth_state", "1M", "--modes", *modes])
    session = SaveSession(options, World(), CPU, tmp_path)
    session.run()
    measured = session.measured

    rows = ["torch.save", "torch.save + fsync", "dcp.async_save", "holdfast"]
    assert [row for row in session.facts if row in rows] == rows
    for row in rows:
        assert [w.repeat for w in measured.windows if w.row == row] == [0, 1]
        assert [i.repeat for i in measured.idle if i.row == row] == [0, 1]
    assert len([w for w in measured.windows if w.row == "none"]) == 2 * NONE_WINDOWS
    raw = [window for window in measured.windows if window.row == "raw write"]
    assert [window.repeat for window in raw] == [0] * RAW_WINDOWS + [1] * RAW_WINDOWS
    assert all(window.stored_secs and sum(window.written_bytes) for window in raw)
    assert len(measured.floors) == 2 * (COPY_PASSES + WRITE_PASSES)
    assert {one.row for one in measured.growth} == {"torch.save", "dcp.async_save", "holdfast"}
    failures = {failure.row: failure.error for failure in measured.failures}
    assert failures == {
        "torch_checkpointing": "ImportError: there is no such module",
        "torchsnapshot": "OSError: the third save",
    }
    assert len(measured.failures) == 2, "a row that failed is left out"

    holdfast = [window for window in measured.windows if window.row == "holdfast"]
    assert all(0 < window.save_secs < window.window_secs for window in holdfast)
    assert all(window.stored_secs is not None and window.cpu_secs > 0 for window in holdfast)
    assert all({"copy", "write"} <= set(window.causes) for window in holdfast)
    summary = summarise(measured, rows)
    assert summary.rows["holdfast"].stored_idle is not None
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert kept == [], "checkpoints are deleted as the run goes on"
