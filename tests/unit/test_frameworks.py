"""What frameworks hand a training loop goes in as it is, and the resumed run is the undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine import Checkpointer
from tests.support.training import differences

Step = Callable[[], None]


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


def bare(seed: int) -> tuple[dict[str, Any], Step]:
    network = model(seed)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = OneCycleLR(optimizer, 0.1, total_steps=50)
    return loop(network, optimizer, schedule, lambda loss: loss.backward())


def fabric(seed: int) -> tuple[dict[str, Any], Step]:
    lightning = pytest.importorskip("lightning")
    framework = lightning.Fabric(accelerator="cpu", devices=1)
    network = model(seed)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = OneCycleLR(optimizer, 0.1, total_steps=50)
    wrapped, stepping = framework.setup(torch.compile(network, backend="eager"), optimizer)
    return loop(wrapped, stepping, schedule, framework.backward)


def accelerate(seed: int) -> tuple[dict[str, Any], Step]:
    framework = pytest.importorskip("accelerate").Accelerator(cpu=True)
    network = model(seed)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = OneCycleLR(optimizer, 0.1, total_steps=50)
    return loop(*framework.prepare(network, optimizer, schedule), framework.backward)


def adapters(seed: int) -> tuple[dict[str, Any], Step]:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["3"], lora_dropout=0.2)
    network = peft.get_peft_model(model(seed), config)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    schedule = OneCycleLR(optimizer, 0.1, total_steps=50)
    return loop(torch.compile(network, backend="eager"), optimizer, schedule, lambda loss: loss.backward())


def loop(network: Any, optimizer: Any, schedule: Any, backward: Any) -> tuple[dict[str, Any], Step]:
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def step() -> None:
        optimizer.zero_grad()
        backward(network(torch.randn(6, 4)).square().mean())
        optimizer.step()
        schedule.step()
        average.update_parameters(network)

    state = {"model": network, "optimizer": optimizer, "schedule": schedule, "average": average}
    return state, step


def everything(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "tensors": [t.detach().clone() for m in ("model", "average") for t in state[m].state_dict().values()],
        "optimizer": state["optimizer"].state_dict(),
        "schedule": state["schedule"].state_dict()["last_epoch"],
        "count": int(state["average"].n_averaged),
        "drawn": torch.rand(3),
    }


@pytest.mark.parametrize("build", [bare, fabric, accelerate, adapters], ids=lambda build: build.__name__)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, build: Any) -> None:
    state, step = build(1)
    with Checkpointer(tmp_path, state) as checkpointer:
        for number in range(1, 4):
            step()
            checkpointer.save(number).result(60)
    for _ in range(3):
        step()
    undisturbed = everything(state)

    state, step = build(2)
    with Checkpointer(tmp_path, state, read_only=True) as checkpointer:
        checkpointer.restore()
    for _ in range(3):
        step()
    assert differences(everything(state), undisturbed) == []


@pytest.mark.parametrize("build", [fabric, accelerate], ids=lambda build: build.__name__)
def test_a_bare_loop_goes_on_where_a_framework_stopped_and_the_other_way_round(
    tmp_path: Path, build: Any
) -> None:
    for first, second in ((build, bare), (bare, build)):
        folder = tmp_path / first.__name__
        state, step = first(1)
        with Checkpointer(folder, state) as checkpointer:
            for _ in range(3):
                step()
            checkpointer.save(3).result(60)
        step()
        undisturbed = everything(state)
        state, step = second(2)
        with Checkpointer(folder, state, read_only=True) as checkpointer:
            checkpointer.restore()
        step()
        assert differences(everything(state), undisturbed) == []
