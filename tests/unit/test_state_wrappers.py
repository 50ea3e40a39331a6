"""A wrapped model is captured as the bare one is, whatever wraps what."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

from engine.state import values
from engine.state.capture import StateCapture

Wrapper = Callable[[nn.Module], Any]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            first=nn.Linear(4, 3),
            inside=nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(3), module=nn.Linear(3, 3))),
            last=nn.Linear(3, 2),
        )
    )


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def captured(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    state = {"model": module} | ({"optimizer": optimizer} if optimizer else {})
    return StateCapture(state, (), 0).capture()


def addresses(module: nn.Module, key: str = "model.") -> dict[str, int]:
    return {n: t.data_ptr() for n, t in captured(module).tensors.items() if n.startswith(key)}


WRAPPERS: list[Wrapper] = [compiled, nn.DataParallel, checkpoint_wrapper, offload_wrapper]


@pytest.mark.parametrize(
    ("outer", "inner"),
    # torch.compile of a compiled module is a function.
    [pair for pair in itertools.product(WRAPPERS, WRAPPERS) if pair != (compiled, compiled)],
    ids=lambda f: f.__name__,
)
def test_names_and_memory_are_the_bare_models_in_any_nesting(outer: Wrapper, inner: Wrapper) -> None:
    model = mlp()
    bare = addresses(model)
    model.first = outer(inner(model.first))
    model.inside.module = inner(model.inside.module)
    model.inside = inner(model.inside)
    assert addresses(outer(inner(model))) == bare
    assert captured(outer(inner(model))).aliases == {}


def test_an_optimizer_over_a_wrapped_model_has_the_bare_names() -> None:
    model = mlp()
    model.first = checkpoint_wrapper(compiled(model.first))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    found = captured(compiled(model), optimizer)
    assert found.shared["optimizer"]["param_groups"][0]["params"] == [n for n, _ in mlp().named_parameters()]
    assert "optimizer.state.first.weight.exp_avg" in found.tensors


def test_an_average_keeps_its_count_and_takes_the_wrappers_out() -> None:
    average = AveragedModel(compiled(mlp()), use_buffers=True)
    assert set(addresses(average)) == {"model.n_averaged", *(f"model.module.{n}" for n in mlp().state_dict())}
    average.update_parameters(compiled(mlp()))
    capture = StateCapture({"model": average}, (), 0)
    assert capture.capture().tensors["model.n_averaged"] == 1
    average.update_parameters(compiled(mlp()))
    assert capture.capture().tensors["model.n_averaged"] == 2


def test_extra_state_inside_of_wrappers_has_the_bare_name() -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"n": 1}

        def set_extra_state(self, state: Any) -> None: ...

    model = nn.Sequential(checkpoint_wrapper(compiled(Counting(1, 1))))
    assert captured(compiled(model)).shared["model"] == {"0._extra_state": {"n": 1}}


def test_a_module_shared_by_two_parents_is_stored_once_under_a_wrapper_too() -> None:
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"a": checkpoint_wrapper(shared), "b": compiled(shared), "c": shared})
    found = captured(model)
    assert [n for n in found.tensors if n.startswith("model.")] == ["model.a.weight"]
    assert found.aliases == {"model.b.weight": "model.a.weight", "model.c.weight": "model.a.weight"}


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.Identity(), nn.ModuleList()], ids=lambda m: type(m).__name__
)
def test_a_module_without_tensors_is_an_entry_like_any_other(loss: nn.Module) -> None:
    assert addresses(loss) == {}
    assert addresses(compiled(loss)) == {}


def test_lightning_fabrics_objects_go_in_as_they_are() -> None:
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1)
    for wrap in (lambda module: module, compiled):
        model = mlp()
        bare = addresses(model)
        wrapped, optimizer = fabric.setup(wrap(model), torch.optim.AdamW(model.parameters()))
        assert addresses(wrapped) == bare
        capture = StateCapture({"model": wrapped, "optimizer": optimizer}, (), 0)
        capture.capture()
        # The wrapper keeps the attributes that the optimizer had then; load_state_dict() gives that others.
        optimizer.load_state_dict(optimizer.state_dict())
        fabric.backward(wrapped(torch.randn(5, 4)).sum())
        optimizer.step()
        found = capture.capture()
        assert "optimizer.state.first.weight.exp_avg" in found.tensors
        assert found.shared["optimizer"]["class"] == "AdamW"


def test_accelerates_objects_go_in_as_they_are() -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = mlp()
    bare = addresses(model)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    wrapped, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    assert addresses(wrapped) == bare
    state = {"model": wrapped, "optimizer": optimizer, "schedule": schedule}
    capture = StateCapture(state, (), 0)
    wrapped(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    found = capture.capture()
    assert "optimizer.state.first.weight.exp_avg" in found.tensors
    assert found.shared["optimizer"]["class"] == "AdamW"
    assert values.decode(found.shared["schedule"], found.tensors.__getitem__)["last_epoch"] == 1


def test_adapters_are_captured_under_their_own_names_wrapped_or_not() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["first"]))
    names = {f"model.{name}" for name in model.state_dict()}
    assert set(addresses(model)) == names
    assert set(addresses(nn.DataParallel(compiled(model)))) == names
