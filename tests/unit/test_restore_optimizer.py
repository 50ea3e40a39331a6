"""An optimizer made ready to read into, and given back its hyperparameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from engine.errors import DamagedError
from engine.restore.optimizer import (
    apply_groups,
    drop_state,
    ensure_state,
    group_differences,
    parameters_without_state,
)
from engine.snapshot.capture import StateCapture
from engine.snapshot.optimizers import OptimizerCapture
from tests.support.training import same_bits


def made(optimizer: str = "AdamW", **more: Any) -> tuple[nn.Linear, Optimizer, OptimizerCapture]:
    network = nn.Linear(3, 2)
    owner: Optimizer = getattr(torch.optim, optimizer)(network.parameters(), **more)
    return network, owner, captured(network, owner)


def captured(network: nn.Module, optimizer: Optimizer) -> OptimizerCapture:
    capture = StateCapture({"model": network, "optimizer": optimizer}, (), 0)
    capture.refresh()
    return capture.optimizers["optimizer"]


def document(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"param_groups": list(groups), **more}


def step(network: nn.Module, optimizer: Optimizer) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("hyper", [{"weight_decay": 0.5}, {"lr": 0.3}, {"amsgrad": True}], ids=str)
def test_making_state_changes_nothing_else(hyper: dict[str, Any]) -> None:
    network, optimizer, _ = made(**hyper)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.weight.grad = torch.full((2, 3), 2.0)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert ensure_state(network, optimizer) is True
    assert set(optimizer.state) == set(network.parameters())
    assert all(same_bits(p, before[name]) for name, p in network.named_parameters())
    assert bool((network.weight.grad == 2).all())
    assert network.bias.grad is None
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups


def test_state_that_is_there_is_kept() -> None:
    network, optimizer, _ = made()
    step(network, optimizer)
    kept = optimizer.state[network.weight]["exp_avg"]
    assert ensure_state(network, optimizer) is False
    assert optimizer.state[network.weight]["exp_avg"] is kept


def test_an_optimizer_without_state_needs_none() -> None:
    network, optimizer, _ = made("SGD", lr=0.1)
    ensure_state(network, optimizer)
    assert not any(optimizer.state.values())


@pytest.mark.parametrize(
    ("saved", "counters", "expected"),
    [
        ([], {}, {"weight", "bias"}),
        (["optimizer.state.weight.exp_avg"], {}, {"bias"}),
        (["optimizer.state.weight.exp_avg", "optimizer.state.bias.step"], {}, set()),
        # Another optimizer's, or another parameter's of a similar name.
        (["other.state.weight.exp_avg", "optimizer.state.weight.inner.exp_avg"], {}, {"weight", "bias"}),
        (["optimizer.param_groups.0.lr"], {}, {"weight", "bias"}),
        ([], {"weight.count": 3}, {"bias"}),
    ],
)
def test_which_parameters_had_no_state(
    saved: list[str], counters: dict[str, int], expected: set[str]
) -> None:
    _, _, capture = made()
    assert parameters_without_state(capture, saved, document(counters=counters)) == expected


def test_parameters_that_had_no_state_lose_it() -> None:
    network, optimizer, capture = made()
    step(network, optimizer)
    drop_state(capture, {"bias"})
    assert set(optimizer.state) == {network.weight}
    drop_state(capture, {"bias"})


def test_hyperparameters_go_to_the_group_of_their_parameters() -> None:
    """By name, whatever the order: and what the checkpoint does not know stays."""
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [network.weight]}, {"params": [network.bias]}], lr=1.0)
    optimizer.param_groups[0]["mine"] = "kept"
    groups = [
        {"params": ["bias"], "lr": 0.1, "betas": (0.5, 0.6)},
        {"params": ["weight"], "lr": 0.2, "new": 7},
    ]
    apply_groups(captured(network, optimizer), document(*groups))
    weight, bias = optimizer.param_groups
    assert (weight["lr"], weight["new"], weight["mine"]) == (0.2, 7, "kept")
    assert (bias["lr"], bias["betas"]) == (0.1, (0.5, 0.6))
    assert weight["params"] == [network.weight]
    assert bias["params"] == [network.bias]


@pytest.mark.parametrize("saved", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_a_tensor_here_stays_that_tensor(saved: Any) -> None:
    rate = torch.tensor(1.0)
    _, optimizer, capture = made(lr=rate)
    apply_groups(capture, document({"params": ["weight", "bias"], "lr": saved}))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_counters_go_where_there_is_state() -> None:
    network, optimizer, capture = made()
    optimizer.state[network.weight]["count"] = 1
    apply_groups(
        capture, document({"params": ["weight", "bias"]}, counters={"weight.count": 9, "bias.count": 9})
    )
    assert optimizer.state[network.weight]["count"] == 9
    assert network.bias not in optimizer.state


@pytest.mark.parametrize(
    ("groups", "lines"),
    [
        ([["weight", "bias"]], []),
        ([["bias", "weight"]], []),
        ([["weight"], ["bias"]], ["optimizer: the parameters of group 0 were in groups [0, 1] when saved"]),
        ([["weight", "bias", "gone"]], []),
        ([["weight"]], []),
    ],
)
def test_groups_that_were_cut_otherwise(groups: list[list[str]], lines: list[str]) -> None:
    _, _, capture = made()
    assert group_differences(capture, document(*({"params": names} for names in groups))) == lines


@pytest.mark.parametrize(
    "value", [{}, {"param_groups": 1}, {"param_groups": [1]}, {"param_groups": [{"lr": 1}]}]
)
def test_values_that_are_not_an_optimizers_are_damage(value: dict[str, Any]) -> None:
    _, _, capture = made()
    for use in (group_differences, apply_groups):
        with pytest.raises(DamagedError, match="optimizer"):
            use(capture, value)
