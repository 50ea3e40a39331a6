"""Exports of values that a plain script has no classes for: loaded as plain ones, exact when imported."""

from __future__ import annotations

import collections
import datetime
import enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from engine import Checkpointer
from engine.convert.export import ExportOptions
from engine.storage.local import LocalStorage
from tests.support.conversions import export_checkpoint, import_checkpoint


class Phase(enum.Enum):
    WARM = 1


class Pair(NamedTuple):
    a: Any
    b: Any


VALUES: dict[str, Any] = {
    "array": np.arange(3),
    "scalar": np.float32(1.5),
    "flag": np.bool_(True),
    "huge": 2**100,
    "when": np.datetime64("2026-01-02"),
    "pair": Pair(1, torch.ones(2)),
    "phase": Phase.WARM,
    "path": Path("/a"),
    "moment": datetime.datetime(2026, 1, 2, 3),
    "wait": datetime.timedelta(seconds=90),
    "queue": collections.deque([1, 2], maxlen=4),
    "frozen": frozenset({1}),
    "set": {1, 2},
    "by_tuple": {(1, 2): "x"},
    "default": collections.defaultdict(list, {"a": [1]}),
    "ordered": collections.OrderedDict(b=1, a=2),
    "bytes": b"raw",
    "complex": 1 + 2j,
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "size": torch.Size([2]),
}
PLAIN: dict[str, Any] = {
    **VALUES,
    "scalar": 1.5,
    "flag": True,
    "when": "2026-01-02",
    "phase": "WARM",
    "path": "/a",
    "moment": "2026-01-02 03:00:00",
    "wait": 90.0,
    "queue": [1, 2],
    "frozen": {1},
    "default": {"a": [1]},
}


def test_any_script_loads_an_export_and_holdfast_gets_everything_back(tmp_path: Path) -> None:
    saved = dict(VALUES)
    with Checkpointer(tmp_path / "run", {"model": nn.Linear(2, 2), "values": saved}) as checkpointer:
        record = checkpointer.save(1).result()
    assert record is not None
    options = ExportOptions(format="torch")
    export_checkpoint(LocalStorage(tmp_path / "run"), record.id, str(tmp_path / "out.pt"), options)
    found = torch.load(tmp_path / "out.pt", weights_only=True)["values"]
    assert found.pop("array").tolist() == [0, 1, 2]
    number, tensor = found.pop("pair")
    assert (number, tensor.tolist()) == (1, [1, 1])
    for name, value in found.items():
        assert value == PLAIN[name], name
        assert type(value) is type(PLAIN[name]), name
    import_checkpoint(str(tmp_path / "out.pt"), str(tmp_path / "again"))
    live: dict[str, Any] = {}
    state = {"model": nn.Linear(2, 2), "values": live}
    with Checkpointer(tmp_path / "again", state, read_only=True) as reader:
        reader.restore()
    for name in VALUES.keys() - {"array", "pair"}:
        assert live[name] == saved[name], name
        assert type(live[name]) is type(saved[name]), name
    assert live["array"].tolist() == [0, 1, 2]
    assert type(live["pair"]) is Pair
