"""Modules whose weights are tensors made of tensors, as torchao quantizes them: saved by their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from engine import Checkpointer
from engine.errors import StateMismatchError


def pair(value: float) -> nn.Module:
    module = nn.Linear(4, 4)
    ones = torch.ones(4, 4)
    module.weight = nn.Parameter(TwoTensor(ones * value, ones * -value), requires_grad=False)
    return module


def saved(directory: Path, module: nn.Module, step: int = 1) -> None:
    with Checkpointer(directory, {"model": module}) as checkpointer:
        checkpointer.save(step).result()


def test_the_parts_are_filled_in_place(tmp_path: Path) -> None:
    saved(tmp_path, pair(3.0))
    fresh = pair(0.0)
    weight, part = fresh.weight, fresh.weight.a
    with Checkpointer(tmp_path, {"model": fresh}) as checkpointer:
        checkpointer.restore("latest")
    assert fresh.weight is weight
    assert weight.a is part
    assert torch.equal(weight.a, torch.full((4, 4), 3.0))
    assert torch.equal(weight.b, torch.full((4, 4), -3.0))


def test_each_save_holds_the_parts_of_its_moment(tmp_path: Path) -> None:
    module = pair(1.0)
    with Checkpointer(tmp_path, {"model": module}) as checkpointer:
        checkpointer.save(1).result()
        module.weight.a.fill_(5.0)  # in place
        checkpointer.save(2).result()
        module.weight.b = torch.full((4, 4), 6.0)  # another part
        checkpointer.save(3).result()
    fresh = pair(0.0)
    with Checkpointer(tmp_path, {"model": fresh}) as checkpointer:
        for step, a, b in ((1, 1.0, -1.0), (2, 5.0, -1.0), (3, 5.0, 6.0)):
            checkpointer.restore(f"step:{step}")
            assert torch.equal(fresh.weight.a, torch.full((4, 4), a))
            assert torch.equal(fresh.weight.b, torch.full((4, 4), b))


def test_a_plain_weight_is_not_filled_from_parts_nor_the_other_way_round(tmp_path: Path) -> None:
    saved(tmp_path / "pair", pair(3.0))
    saved(tmp_path / "plain", nn.Linear(4, 4))
    for directory, module in (("pair", nn.Linear(4, 4)), ("plain", pair(1.0))):
        with (
            Checkpointer(tmp_path / directory, {"model": module}) as checkpointer,
            pytest.raises(StateMismatchError, match=r"model\.weight"),
        ):
            checkpointer.restore("latest")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchaos_quantized_weights_come_back_to_the_bit(tmp_path: Path, config: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).to(torch.bfloat16)
        torchao.quantize_(module, getattr(torchao, config)())
        return module

    trained, fresh = model(0), model(1)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert not torch.equal(trained(x), fresh(x))
    saved(tmp_path, trained)
    with Checkpointer(tmp_path, {"model": fresh}) as checkpointer:
        checkpointer.restore("latest")
    assert torch.equal(trained(x), fresh(x))


@pytest.mark.slow
def test_another_quantization_is_refused_by_name(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def model(config: str) -> nn.Module:
        module = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
        torchao.quantize_(module, getattr(torchao, config)())
        return module

    saved(tmp_path, model("Int8WeightOnlyConfig"))
    fresh = model("Int8DynamicActivationInt8WeightConfig")
    before = fresh[0].weight.qdata.clone()
    with (
        Checkpointer(tmp_path, {"model": fresh}) as checkpointer,
        pytest.raises(StateMismatchError, match=r"model\.0\.weight: saved as .*Int8Tensor"),
    ):
        checkpointer.restore("latest")
    assert torch.equal(fresh[0].weight.qdata, before)

