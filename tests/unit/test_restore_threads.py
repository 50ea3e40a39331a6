"""How many reads a restore keeps in flight: few on a disk, more over a network."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.restore import restorer
from engine.restore.read import LOCAL_PACE, STORE_PACE


@pytest.mark.parametrize("remote", [False, True])
def test_a_store_is_read_by_more_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    directory = f"memory://{uuid.uuid4()}/run" if remote else str(tmp_path)
    asked: list[tuple[int, int]] = []
    real = restorer.read_slices

    def noting(*args: Any, threads: int, window_bytes: int) -> Any:
        asked.append((threads, window_bytes))
        return real(*args, threads=threads, window_bytes=window_bytes)

    monkeypatch.setattr(restorer, "read_slices", noting)
    weights = torch.arange(1000.0)
    with Checkpointer(directory, {"model": {"w": weights}}) as saving:
        saving.save(1).result(60.0)
    target = {"w": torch.zeros(1000)}
    with Checkpointer(directory, {"model": target}) as reading:
        reading.restore()
    assert torch.equal(target["w"], weights)
    assert asked == [STORE_PACE if remote else LOCAL_PACE]
    assert asked[0][0] * asked[0][1] <= 32 << 20, "what a rank may hold above its tensors"
