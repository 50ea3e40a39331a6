"""Restoring part of a checkpoint, or into another architecture."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import StateMismatchError
from engine.restore.filters import Filter


@pytest.mark.parametrize(
    ("filter", "name", "takes"),
    [
        (Filter(), "model.a", True),
        (Filter(include=("model.a*",)), "model.ab", True),
        (Filter(include=("model.a*",)), "model.b", False),
        (Filter(exclude=("*.b",)), "model.b", False),
        (Filter(include=("model.*",), exclude=("*.b",)), "model.b", False),
        (Filter(include=("model.*",), exclude=("*.b",)), "model.c", True),
        (Filter(include=("model",)), "model.c", True),
        (Filter(include=("mod*",)), "model.c", True),
        (Filter(exclude=("model",)), "model.c", False),
        (Filter(include=("loader",)), "model.c", False),
    ],
)
def test_names(filter: Filter, name: str, takes: bool) -> None:
    assert filter.takes(name) is takes


@pytest.mark.parametrize(
    ("filter", "takes"),
    [
        (Filter(), True),
        (Filter(include=("model.*",)), False),
        (Filter(include=("optimizer.*",)), True),
        (Filter(include=("optimizer",)), True),
        (Filter(include=("optimizer.state.a.*",)), False),
        (Filter(exclude=("optimizer*",)), False),
    ],
)
def test_keys(filter: Filter, takes: bool) -> None:
    assert filter.takes_key("optimizer") is takes


class Net(nn.Module):
    def __init__(self, rows: int, hidden: int = 4, extra: bool = False, fill: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, 3)
        self.body = nn.Linear(3, hidden)
        if extra:
            self.head = nn.Linear(hidden, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(fill)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = Net(rows=5, fill=1.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    net.embedding.weight.sum().backward()
    optimizer.step()
    with Checkpointer(tmp_path, {"model": net, "optimizer": optimizer, "extra": {"n": 7}}) as ckpt:
        ckpt.save(3).result()
    return tmp_path


def restore(saved: Path, net: nn.Module, **how: object) -> dict[str, object]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.25)
    extra: dict[str, object] = {"n": 0}
    state = {"model": net, "optimizer": optimizer, "extra": extra}
    with Checkpointer(saved, state, read_only=True) as ckpt:
        assert ckpt.restore("latest", **how) is not None  # type: ignore[arg-type]
    return {"lr": optimizer.param_groups[0]["lr"], "state": len(optimizer.state), **extra}


def test_model_only_leaves_everything_else_alone(saved: Path) -> None:
    net = Net(rows=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert restore(saved, net, model_only=True) == {"lr": 0.25, "state": 0, "n": 0}
    assert float(net.body.weight.detach().min()) == 1.0
    assert torch.equal(torch.get_rng_state(), before)


def test_include_and_exclude_choose_by_name(saved: Path) -> None:
    net = Net(rows=5)
    assert restore(saved, net, include=["model.*", "extra"], exclude=["*.bias"]) == {
        "lr": 0.25,
        "state": 0,
        "n": 7,
    }
    assert float(net.body.weight.detach().min()) == 1.0
    assert float(net.body.bias.detach().max()) == 0.0


@pytest.mark.parametrize(
    ("how", "comes_back"),
    [
        ({}, True),
        ({"exclude": ["rng"]}, False),
        ({"include": ["model.*"]}, False),
        ({"include": ["model.*", "rng"]}, True),
        ({"include": ["model.*", "r*"], "exclude": ["rng"]}, False),
    ],
    ids=str,
)
def test_the_generators_are_the_key_rng(
    tmp_path: Path, how: dict[str, list[str]], comes_back: bool
) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with Checkpointer(tmp_path, {"model": nn.Linear(2, 2), "n": {"n": 1}}) as ckpt:
        ckpt.save(1).result()
        saved = drawn()
        assert ckpt.restore("latest", **how) is not None  # type: ignore[arg-type]
        again = drawn()
    assert [one == other for one, other in zip(saved, again, strict=True)] == [comes_back] * 3


def test_what_is_excluded_need_not_fit(saved: Path) -> None:
    net = Net(rows=5, hidden=9)
    restore(saved, net, include=["model.embedding.*"])
    assert float(net.embedding.weight.detach().max()) != 0.0


def test_a_grown_vocabulary_is_filled_and_the_rest_stays_initialised(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net(rows=8, hidden=2, extra=True, fill=-2.0)
    with caplog.at_level(logging.WARNING, logger="engine"):
        restore(saved, net, model_only=True, strict=False)
    weight = net.embedding.weight.detach()
    assert bool((weight[:5] != -2.0).all())
    assert bool((weight[5:] == -2.0).all())
    assert bool((net.body.weight.detach() == -2.0).all()), "other shapes are not touched"
    message = caplog.text
    for part in (
        "model.embedding.weight: saved as F32 [5, 3], here F32 [8, 3]",
        "model.body.weight",
        "model.head",
    ):
        assert part in message
    assert "0 tensors loaded, 1 filled" in message


def test_every_difference_has_a_row_of_one_table(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(8, 3), "other": nn.Linear(3, 2)})
    net["many"] = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(60)])
    restore(saved, net, model_only=True, strict=False)
    (message,) = (record.getMessage() for record in caplog.records if "tensors loaded" in record.getMessage())
    head, *rows = message.splitlines()
    assert head.endswith("0 tensors loaded, 1 filled in part")
    assert rows[0] == (
        "  different                  model.embedding.weight: saved as F32 [5, 3], here F32 [8, 3]"
    )
    missing = [row for row in rows if row.startswith("  missing in the checkpoint  model.")]
    assert len(missing) == 62
    assert all(row.startswith("  not in the state           model.body.") for row in rows[63:])
    assert len(rows) == 1 + 62 + 2


def test_a_strict_restore_that_does_not_fit_changes_nothing(saved: Path) -> None:
    net = Net(rows=8)
    with pytest.raises(StateMismatchError, match="saved as F32 \\[5, 3\\], here F32 \\[8, 3\\]"):
        restore(saved, net)
    assert all(bool((parameter == 0).all()) for parameter in net.parameters())


def test_a_shrunk_tensor_is_not_filled(saved: Path) -> None:
    net = Net(rows=3)
    restore(saved, net, model_only=True, strict=False)
    assert bool((net.embedding.weight.detach() == 0).all())


@pytest.mark.parametrize(
    ("filter", "unknown"),
    [
        (Filter(include=("modle.*",)), ["modle.*"]),
        (Filter(include=("model.bodi.*",)), ["model.bodi.*"]),
        (Filter(include=("*.bias", "loader", "optimizer.param_groups.lr")), []),
        (Filter(exclude=("optimizer.param_groups.lr", "rng", "model.body.bias")), []),
        (Filter(exclude=("modle",)), ["modle"]),
    ],
)
def test_patterns_that_mean_nothing(filter: Filter, unknown: list[str]) -> None:
    names = ["model.body.weight", "model.body.bias"]
    keys = {"model", "optimizer", "loader", "rng"}
    assert filter.unknown(names, keys, excluded=bool(filter.exclude)) == unknown


@pytest.mark.parametrize(
    "wrong", [{"include": ["modle"]}, {"include": ["n", "model.bdy.*"]}]
)
def test_a_name_that_is_nowhere_changes_nothing(wrong: Any, tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"model": Net(2, fill=1.0), "n": {"n": 1}}) as checkpointer:
        checkpointer.save(1).result()
    live = Net(2)
    with (
        Checkpointer(tmp_path, {"model": live, "n": {"n": 0}}, read_only=True) as checkpointer,
        pytest.raises(StateMismatchError, match="nor the state has; nothing was changed"),
    ):
        checkpointer.restore(**wrong)
    assert not live.body.weight.any()


@pytest.mark.parametrize(
    ("options", "filled"), [({"include": ["model"]}, True), ({"exclude": ["model"]}, False)]
)
def test_a_state_key_means_all_below_it(options: Any, filled: bool, tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"model": Net(2, fill=1.0), "n": {"n": 1}}) as checkpointer:
        checkpointer.save(1).result()
    live, other = Net(2), {"n": 0}
    with Checkpointer(tmp_path, {"model": live, "n": other}, read_only=True) as checkpointer:
        checkpointer.restore(**options)
    assert bool(live.body.weight.all()) is filled
    assert other == {"n": 0 if filled else 1}
