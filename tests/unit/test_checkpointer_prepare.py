"""`prepare` allocates the snapshot's memory before the first save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import MemoryBudgetError, UnsavableValueError
from engine.save import snapshot as snapshot_module


def state() -> dict[str, object]:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_the_first_save_takes_no_memory_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = snapshot_module.StagingBuffer

    def counted(*args: object, **kwargs: object) -> object:
        taken.append(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot_module, "StagingBuffer", counted)
    with Checkpointer(tmp_path, state()) as ckpt:
        ckpt.prepare()
        assert len(taken) == 1
        record = ckpt.save(1).result()
        assert len(taken) == 1
        assert record is not None
        assert ckpt.restore("step:1") is not None


def test_it_says_what_a_save_would(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, state(), memory_budget_bytes=1000) as ckpt, pytest.raises(MemoryBudgetError):
        ckpt.prepare()
    with Checkpointer(tmp_path, {**state(), "odd": {"f": print}}) as ckpt, pytest.raises(UnsavableValueError):
        ckpt.prepare()


def test_a_state_that_changed_after_it_is_planned_anew(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.prepare()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        ckpt.save(1).result()
        before = optimizer.state[model.weight]["exp_avg"].clone()
        optimizer.state[model.weight]["exp_avg"].zero_()
        ckpt.restore()
        assert torch.equal(optimizer.state[model.weight]["exp_avg"], before)
