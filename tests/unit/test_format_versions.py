"""Version 2 stands in a file exactly where something in that file needs it: older readers read all others."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine import Checkpointer

F4 = torch.arange(6, dtype=torch.uint8).view(2, 3).view(torch.float4_e2m1fn_x2)


def with_state_under_text() -> dict[str, Any]:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters())
    optimizer.state["global"] = {"step": 1}  # type: ignore[index]
    return {"model": module, "optimizer": optimizer}


@pytest.mark.parametrize(
    ("shared", "own", "manifest", "index"),
    [
        ({"v": {"a": [1, (2.0, None)], "t": torch.ones(1), "c": collections.Counter({3: 1})}}, {}, 1, 1),
        ({"model": nn.BatchNorm1d(2), "v": {3: float("inf")}}, {"n": 1}, 1, 1),
        ({"v": {"path": Path("/a")}}, {"n": 1}, 2, 1),
        ({"v": {"n": 1}}, {"array": np.arange(2)}, 1, 2),
        ({"v": {"t": F4}}, {}, 2, 2),
        (with_state_under_text(), {}, 2, 1),
    ],
    ids=["plain", "module", "shared value", "own value", "F4", "optimizer"],
)
def test_each_file_declares_what_it_needs(
    shared: dict[str, Any], own: dict[str, Any], manifest: int, index: int, tmp_path: Path
) -> None:
    with Checkpointer(tmp_path, {**shared, "own": own}, per_rank=("own",)) as checkpointer:
        record = checkpointer.save(1).result()
    assert record is not None
    found = [
        json.loads((tmp_path / record.id / name).read_bytes())
        for name in ("manifest.json", "shard-00000.json")
    ]
    assert [document["format_version"] for document in found] == [manifest, index]
