"""How many reads a restore keeps in flight: few on a disk, more over a network."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.restore import chosen
from engine.restore.read import LOCAL_PACE, STORE_PACE, Pace


@pytest.mark.parametrize("remote", [False, True])
def test_a_store_is_read_by_more_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    directory = f"memory://{uuid.uuid4()}/run" if remote else str(tmp_path)
    asked: list[Pace] = []
    real = chosen.read_slices

    def noting(*args: Any, pace: Pace) -> Any:
        asked.append(pace)
        return real(*args, pace=pace)

    monkeypatch.setattr(chosen, "read_slices", noting)
    weights = torch.arange(1000.0)
    with Checkpointer(directory, {"model": {"w": weights}}) as saving:
        saving.save(1).result(60.0)
    target = {"w": torch.zeros(1000)}
    with Checkpointer(directory, {"model": target}) as reading:
        reading.restore()
    assert torch.equal(target["w"], weights)
    assert asked == [STORE_PACE if remote else LOCAL_PACE]
    assert asked[0].threads * asked[0].window_bytes <= 32 << 20, "what a rank may hold above its tensors"
