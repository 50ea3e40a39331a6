"""Arguments are checked where they are given; one sentence says what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import ConfigError
from engine.format.json import canonical_bytes
from engine.save.arguments import check_save, check_selector, plain_metrics, whole_numbers
from engine.save.plain_config import plain_config

State = dict[str, Any]


class Kind(enum.Enum):
    FAST = "fast"
    ODD = object()


class Text(str):
    pass


@dataclasses.dataclass
class Settings:
    lr: Any = 0.1
    inner: Any = None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"retention": 3}, r"retention is 3: it must be a Retention, or None"),
        ({"state": nn.Linear(1, 1)}, r"state is a Linear: give a dict that names it, .*\{'model': model\}"),
        ({"state": [nn.Linear(1, 1)]}, r"state is a list: it must be a dict from names to the objects"),
        ({"state": {1: {}}}, r"the state key 1 is not text"),
        ({"per_rank": "model"}, r"per_rank is the text 'model': give a tuple, per_rank=\('model',\)"),
        ({"per_rank": 3}, r"per_rank is 3: it must be a tuple of names"),
        ({"per_rank": (3,)}, r"per_rank is \(3,\): it must be a tuple of names"),
        ({"directory": 5}, r"directory is 5: it must be a path or a URI"),
        ({"directory": None}, r"directory is None: it must be a path or a URI"),
        ({"directory": b"x"}, r"directory is a bytes: it must be a path"),
        ({"mirror": 5}, r"mirror is 5: it must be a path or a URI"),
        ({"mirror_freq": 1.5}, r"mirror_freq is 1\.5: it must be a whole number of steps, 0 or more"),
        ({"mirror_freq": -1}, r"mirror_freq is -1: it must be a whole number of steps, 0 or more"),
        ({"busy": "later"}, r"busy is 'later': it must be 'wait' or 'skip'"),
        ({"timeout_secs": 0}, r"timeout_secs is 0: it must be a number of seconds above 0"),
        ({"timeout_secs": "5"}, r"timeout_secs is '5': it must be a number"),
        ({"timeout_secs": float("nan")}, r"timeout_secs is nan: it must be a number"),
        ({"timeout_secs": True}, r"timeout_secs is True: it must be a number"),
        ({"overlap": "never"}, r"overlap is 'never': it must be 'auto' or False"),
        ({"seed": 1.5}, r"seed is 1\.5: it must be a whole number"),
        ({"read_only": "yes"}, r"read_only is 'yes': it must be True or False"),
        ({"check_snapshots": 1}, r"check_snapshots is 1: it must be True or False"),
        ({"memory_budget_bytes": "1G"}, r"memory_budget_bytes is '1G': it must be a whole number of bytes"),
        ({"memory_budget_bytes": 0}, r"memory_budget_bytes is 0: it must be a whole number of bytes"),
        ({"storage_options": "x"}, r"storage_options is 'x': it must be a dict, or None"),
        ({"on_event": 5}, r"on_event is 5: it must be a function of one dict"),
        ({"config": 5}, r"config is a int: it must be a dict, a namespace or a dataclass"),
        ({"config": {"a": [object()]}}, r"config\.a\[0\] is a builtins\.object, which JSON cannot hold"),
        ({"config": {"a": torch.ones(2)}}, r"config\.a is a tensor of shape \[2\]: give a number"),
        ({"config": {1: 0, "1": 0}}, r"config has two keys that are both written '1' in JSON"),
        ({"config": {"a": 2**70}}, r"config cannot be written as JSON: a is an integer beyond 64 bits"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_a_checkpointer_refuses_what_cannot_work(given: State, words: str, tmp_path: Path) -> None:
    arguments: State = {"directory": tmp_path / "new", "state": {"a": {}}, **given}
    with pytest.raises(ConfigError, match=f"^{words}"):
        Checkpointer(arguments.pop("directory"), arguments.pop("state"), **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"step": True}, r"step is True: it must be a whole number"),
        ({"step": 1.0}, r"step is 1\.0: it must be a whole number"),
        ({"step": None}, r"step is None: it must be a whole number"),
        ({"step": "5"}, r"step is '5': it must be a whole number"),
        ({"step": torch.tensor(True)}, r"step is a Tensor: it must be a whole number"),
        ({"step": torch.ones(2, dtype=torch.int64)}, r"step is a Tensor: it must be a whole number"),
        ({"step": -1}, r"step is -1: it must be from 0 to 281474976710656 \(2\*\*48\)"),
        ({"step": 2**48 + 1}, r"step is 281474976710657: it must be from 0 to 281474976710656"),
        ({"step": 2**70}, r"step is 1180591620717411303424: it does not fit into 64 bits"),
        ({"epoch": -1}, r"epoch is -1: it must be 0 or more"),
        ({"tokens": 1.5}, r"tokens is 1\.5: it must be a whole number"),
        ({"metrics": {"val_loss": None}}, r"the metric 'val_loss' is None: leave it out of saves"),
        ({"metrics": {"val_loss": "low"}}, r"the metric 'val_loss' is 'low': it must be a single number"),
        ({"metrics": {"val_loss": "1.5"}}, r"the metric 'val_loss' is '1\.5': it must be a single number"),
        ({"metrics": {"a": torch.ones(2)}}, r"the metric 'a' is a Tensor: it must be a single number"),
        ({"metrics": {"a": 1j}}, r"the metric 'a' is a complex: it must be a single number"),
        ({"metrics": {"a": np.complex64(1)}}, r"the metric 'a' is a complex64: it must be a single number"),
        ({"metrics": {5: 1.0}}, r"the metric name 5 is not text"),
        ({"metrics": 1.5}, r"metrics is 1\.5: it must be a dict from names to numbers"),
        ({"reasons": "best"}, r"reasons is the text 'best': give a tuple, reasons=\('best',\)"),
        ({"reasons": ()}, r"reasons is \(\): it must name one or more of interval, epoch"),
        ({"reasons": ("whim",)}, r"reasons is \('whim',\): it must name one or more of interval"),
        ({"reasons": ("best", "best")}, r"reasons is \('best', 'best'\): .* each once"),
    ],
    ids=str,
)
def test_a_save_refuses_what_cannot_work(given: State, words: str, tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"a": {"n": 1}}) as checkpointer:
        with pytest.raises(ConfigError, match=f"^{words}"):
            checkpointer.save(**{"step": 1, **given})
        assert checkpointer.list() == []
        assert checkpointer.save(1).result() is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"selector": 2}, r"the selector is 2: it must be text, such as 'step:2'"),
        ({"selector": None}, r"the selector is None: it must be text, such as 'latest'"),
        ({"include": "model.*"}, r"include is the text 'model\.\*': give a tuple, include=\('model\.\*',\)"),
        ({"exclude": [5]}, r"exclude is \[5\]: it must be a tuple of names"),
        ({"strict": None}, r"strict is None: it must be True or False"),
        ({"model_only": "model"}, r"model_only is 'model': it must be True or False"),
    ],
    ids=str,
)
def test_a_restore_refuses_what_cannot_work(given: State, words: str, tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"a": {"n": 1}}) as checkpointer:
        with pytest.raises(ConfigError, match=f"^{words}"):
            checkpointer.restore(**given)
        assert checkpointer.restore() is None


def test_numbers_of_numpy_and_torch_are_taken() -> None:
    assert whole_numbers(step=np.int64(3), epoch=torch.tensor(4)) == [3, 4]
    assert check_save(2**48, 0, 2**60, ["best"]) == ("best",)
    assert check_selector(Path("/a/b")) == "/a/b"
    metrics = {"a": torch.tensor(1.5), "b": np.float32(2.5), "c": 3, "d": torch.ones(1), "e": float("nan")}
    found = plain_metrics(metrics)
    assert [type(value) for value in found.values()] == [float] * 5
    assert list(found.values())[:4] == [1.5, 2.5, 3.0, 1.0]
    assert plain_metrics(None) == {}


def test_a_configuration_takes_what_people_put_there() -> None:
    given = {
        "path": Path("/data/x"),
        "kind": Kind.FAST,
        "odd": Kind.ODD,
        "lr": torch.tensor(0.5),
        "steps": np.int64(3),
        "rate": np.float32(0.25),
        "grid": np.arange(3),
        "betas": (0.9, 0.99),
        "names": {"b", "a"},
        "inf": float("inf"),
        "nan": [np.float64("nan")],
        "none": None,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:0"),
        "size": torch.Size([2, 3]),
        "class": nn.GELU,
        "function": torch.relu,
        "text": Text("t"),
        "when": datetime.datetime(2026, 1, 2, 3),
        "wait": datetime.timedelta(hours=1),
        "inner": Settings(lr=Kind.FAST, inner=argparse.Namespace(a=1)),
        "space": types.SimpleNamespace(b=2),
        3: {True: "x", None: "y"},
    }
    found = plain_config(given)
    canonical_bytes(found)
    assert found == {
        "path": "/data/x",
        "kind": "fast",
        "odd": "ODD",
        "lr": 0.5,
        "steps": 3,
        "rate": 0.25,
        "grid": [0, 1, 2],
        "betas": [0.9, 0.99],
        "names": ["a", "b"],
        "inf": "inf",
        "nan": ["nan"],
        "none": None,
        "dtype": "torch.bfloat16",
        "device": "cuda:0",
        "size": [2, 3],
        "class": "torch.nn.modules.activation.GELU",
        "function": found["function"],
        "text": "t",
        "when": "2026-01-02T03:00:00",
        "wait": "1:00:00",
        "inner": {"lr": "fast", "inner": {"a": 1}},
        "space": {"b": 2},
        "3": {"True": "x", "None": "y"},
    }
    assert found["function"].endswith("relu")
    assert type(found["text"]) is str


@pytest.mark.parametrize(
    "config", [argparse.Namespace(lr=1), types.SimpleNamespace(lr=1), Settings(1), {"lr": 1}]
)
def test_a_configuration_may_be_a_namespace_or_a_dataclass(config: Any) -> None:
    assert plain_config(config)["lr"] == 1


def test_a_configuration_with_a_cycle_is_refused() -> None:
    loop: State = {}
    loop["again"] = loop
    with pytest.raises(ConfigError, match="nested deeper"):
        plain_config(loop)
