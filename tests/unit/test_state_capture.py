"""What is captured, under which names; that it is captured once, and that no change goes unnoticed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from engine.errors import UnsavableValueError
from engine.format.forms import without_order
from engine.state import modules
from engine.state.capture import StateCapture
from engine.state.captured import Captured, per_rank_name


def mlp() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(first=nn.Linear(4, 3), norm=nn.BatchNorm1d(3, affine=False), last=nn.Linear(3, 2))
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()


def trained() -> tuple[nn.Sequential, torch.optim.AdamW]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    return model, optimizer


class Counter:
    """An object of the caller's own."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def live(captured: Captured, *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in captured.tensors.items() if name.startswith(prefixes)}


def test_tensors_have_canonical_names_and_are_the_live_ones() -> None:
    model, optimizer = trained()
    captured = StateCapture({"model": model, "optimizer": optimizer}, (), 0).capture()
    expected = {f"model.{name}" for name in model.state_dict()}
    expected |= {
        f"optimizer.state.{name}.{field}"
        for name, _ in model.named_parameters()
        for field in ("step", "exp_avg", "exp_avg_sq")
    }
    assert set(live(captured, "model.", "optimizer.")) == expected == captured.fixed
    assert captured.tensors["model.first.weight"].data_ptr() == model.first.weight.data_ptr()
    moment = optimizer.state[model.last.bias]["exp_avg"]
    assert captured.tensors["optimizer.state.last.bias.exp_avg"].data_ptr() == moment.data_ptr()
    assert not any(tensor.requires_grad for tensor in captured.tensors.values())
    groups = captured.shared["optimizer"]["param_groups"]
    assert groups[0]["params"] == [name for name, _ in model.named_parameters()]
    assert groups[0]["betas"] == {"$tuple": [0.9, 0.999]}


def test_only_what_a_step_changes_is_guarded() -> None:
    model, optimizer = trained()
    model.last.requires_grad_(False)
    average = copy.deepcopy(model).requires_grad_(False)
    partial = torch.optim.SGD(model.first.parameters(), momentum=0.9)
    train(model, partial)
    state = {"model": model, "average": average, "optimizer": partial, "other": {"t": torch.ones(2)}}
    captured = StateCapture(state, (), 0).capture()
    assert captured.guarded == {
        "model.first.weight",
        "model.first.bias",
        "optimizer.state.first.weight.momentum_buffer",
        "optimizer.state.first.bias.momentum_buffer",
    }
    del optimizer


def test_the_generators_belong_to_the_rank() -> None:
    captured = StateCapture({}, (), 12).capture()
    assert set(captured.tensors) == {
        "per_rank.00012.rng.python.words",
        "per_rank.00012.rng.numpy.keys",
        "per_rank.00012.rng.torch",
    }
    assert set(captured.local) == {"rng"}
    assert captured.shared == {}


def test_generators_are_read_before_any_state_dict_runs() -> None:
    class Drawing(Counter):
        def state_dict(self) -> dict[str, Any]:
            torch.rand(7)
            return {}

    before = torch.get_rng_state()
    captured = StateCapture({"drawing": Drawing()}, (), 0).capture()
    assert torch.equal(captured.tensors["per_rank.00000.rng.torch"], before)
    assert torch.equal(torch.get_rng_state(), before), "saving changes nothing that training draws"


def test_plain_entries_are_shared_or_the_ranks_own() -> None:
    state = {
        "loader": Counter(position=7, table=torch.arange(3)),
        "settings": {"a": [1, (2,)]},
        "history": [torch.ones(1), 2],
        "scale": torch.tensor(2.0),
        "mine": {"t": torch.zeros(2), "n": 3},
    }
    captured = StateCapture(state, ("mine",), 3).capture()
    assert captured.shared == {
        "loader": {"position": 7, "table": {"$tensor": "loader.table"}},
        "settings": {"a": [1, {"$tuple": [2]}]},
        "history": [{"$tensor": "history.0"}, 2],
        "scale": {"$tensor": "scale"},
    }
    assert without_order(captured.local["mine"]) == {"t": {"$tensor": "per_rank.00003.mine.t"}, "n": 3}
    assert per_rank_name(3, "mine") == "per_rank.00003.mine"
    assert captured.tensors["scale"] is state["scale"]
    assert {"loader.table", "history.0", "scale", "per_rank.00003.mine.t"} <= set(captured.tensors)


@pytest.mark.parametrize("key", ["", "a.b", "$a", "rng", "per_rank"])
def test_keys_that_would_clash_are_refused(key: str) -> None:
    with pytest.raises(UnsavableValueError, match="cannot be used"):
        StateCapture({key: {}}, (), 0)


@pytest.mark.parametrize("entry", [3, "text", None, object(), (1, 2)], ids=lambda entry: type(entry).__name__)
def test_entries_that_cannot_be_restored_in_place_are_refused(entry: Any) -> None:
    with pytest.raises(UnsavableValueError, match="'entry' is a"):
        StateCapture({"entry": entry}, (), 0)


@pytest.mark.parametrize("name", ["missing", "mod"])
def test_per_rank_names_keys_of_the_state(name: str) -> None:
    model, optimizer = trained()
    with pytest.raises(UnsavableValueError, match=f"per_rank names '{name}'"):
        StateCapture({"model": model, "optimizer": optimizer}, (name,), 0)


def test_an_optimizer_needs_its_module() -> None:
    model, optimizer = trained()
    with pytest.raises(UnsavableValueError, match=r"optimizer: parameter 0 .* is not in the state"):
        StateCapture({"model": mlp(), "optimizer": optimizer}, (), 0).capture()
    StateCapture({"other": mlp(), "model": model, "optimizer": optimizer}, (), 0).capture()


def test_tied_weights_are_stored_once_and_listed() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    captured = StateCapture({"model": model}, (), 0).capture()
    assert set(live(captured, "model.")) == {"model.embed.weight"}
    assert captured.aliases == {"model.head.weight": "model.embed.weight"}


def test_weights_tied_across_modules_are_stored_once() -> None:
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    two.weight = one.weight
    captured = StateCapture({"one": one, "two": two}, (), 0).capture()
    assert set(live(captured, "one.", "two.")) == {"one.weight"}
    assert captured.aliases == {"two.weight": "one.weight"}


def test_equal_weights_are_not_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].load_state_dict(model["a"].state_dict())
    assert StateCapture({"model": model}, (), 0).capture().aliases == {}


def test_buffers_that_are_not_persistent_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("cache", torch.ones(2), persistent=False)
    model.register_buffer("absent", None)
    captured = StateCapture({"model": model}, (), 0).capture()
    assert set(live(captured, "model.")) == {"model.weight", "model.bias", "model.kept"}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "inside"])
def test_compiled_models_have_the_names_of_plain_ones(whole: bool) -> None:
    model = mlp()
    compiled: Any = torch.compile(model, backend="eager") if whole else model
    if not whole:
        model.first = torch.compile(model.first, backend="eager")
    optimizer = torch.optim.AdamW(compiled.parameters())
    train(compiled, optimizer)
    captured = StateCapture({"model": compiled, "optimizer": optimizer}, (), 0).capture()
    names = set(live(captured, "model.", "optimizer."))
    assert "model.first.weight" in names
    assert "optimizer.state.first.weight.exp_avg" in names
    assert not any("_orig_mod" in name for name in names)
    assert captured.shared["optimizer"]["param_groups"][0]["params"][0] == "first.weight"


def test_a_module_or_parameter_called_module_keeps_its_name() -> None:
    """Only the wrappers of DDP and torch.compile are taken out of names."""
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    captured = StateCapture({"model": model, "optimizer": optimizer}, (), 0).capture()
    assert set(live(captured, "model.")) == {"model.module.weight", "model.module.bias"}
    assert captured.shared["optimizer"]["param_groups"][0]["params"] == ["module.weight", "module.bias"]


class WithExtra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return copy.deepcopy(self.extra)

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"count": 1}, torch.ones(2)], ids=["json", "tensor"])
def test_extra_state_of_a_module_is_read_anew_each_time(extra: Any) -> None:
    model = WithExtra(extra)
    capture = StateCapture({"model": model}, (), 0)
    capture.capture()
    if isinstance(extra, dict):
        model.extra = {"count": 2}
        assert capture.capture().shared["model"] == {"_extra_state": {"count": 2}}
        return
    model.extra = torch.full((2,), 9.0)
    captured = capture.capture()
    assert captured.tensors["model._extra_state"].tolist() == [9, 9]


class Walks:
    """Counts how often a module is walked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = modules.read_state_dict

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(modules, "read_state_dict", counted)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Walks:
    return Walks(monkeypatch)


def test_nothing_is_walked_again_when_nothing_changed(walks: Walks) -> None:
    model, optimizer = trained()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    capture = StateCapture({"model": model, "optimizer": optimizer, "schedule": schedule}, (), 0)
    first = capture.capture()
    assert walks.count == 1, "once, for the module and its optimizer"
    train(model, optimizer, 2)
    schedule.step()
    second = capture.capture()
    assert walks.count == 1
    assert second.generation == first.generation
    assert without_order(second.shared["schedule"])["last_epoch"] == 1, "values are read anew all the same"


def reload_optimizer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["exp_avg"].fill_(8)
    optimizer.load_state_dict(state)


def replace_entry(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    parameter = model.first.weight
    optimizer.state[parameter] = {k: torch.full_like(v, 8.0) for k, v in optimizer.state[parameter].items()}


def replace_state(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.first.weight]["exp_avg"] = torch.full((3, 4), 8.0)


def forget_and_step(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()
    train(model, optimizer)


def replace_child(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.norm = nn.BatchNorm1d(3, affine=False)
    model.norm.running_mean.fill_(8.0)


def replace_grandchild(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.last = nn.Sequential(model.last)


def add_child(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.add_module("more", nn.Linear(2, 2))


def add_parameter(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))


def add_buffer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.norm.register_buffer("seen", torch.ones(1))


def remove_buffer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    del model.norm.num_batches_tracked


def replace_buffer(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.norm.running_mean = torch.full((3,), 8.0)


def move_data(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.first.weight.data = torch.full((3, 4), 8.0)


def move_state(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.first.weight]["exp_avg"].data = torch.full((3, 4), 8.0)


def cast(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.to(torch.float64)


def add_group(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    optimizer.add_param_group({"params": [model.scale]})


CHANGES = [
    reload_optimizer,
    replace_entry,
    replace_state,
    forget_and_step,
    replace_child,
    replace_grandchild,
    add_child,
    add_parameter,
    add_buffer,
    remove_buffer,
    replace_buffer,
    move_data,
    move_state,
    cast,
    add_group,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_of_structure_goes_unnoticed(
    change: Callable[[nn.Sequential, torch.optim.Optimizer], None],
) -> None:
    """A capture that has a history finds exactly what a fresh one finds, down to the memory."""
    model, optimizer = trained()
    state = {"model": model, "optimizer": optimizer}
    capture = StateCapture(state, (), 0)
    first = capture.capture()
    change(model, optimizer)
    second, fresh = capture.capture(), StateCapture(state, (), 0).capture()
    assert second.generation > first.generation
    described = [
        {name: (t.data_ptr(), t.dtype, t.shape) for name, t in live(found, "model.", "optimizer.").items()}
        for found in (second, fresh)
    ]
    assert described[0] == described[1]
    # Only a capture that has a history knows which buffers came later.
    second.shared.pop("model", None)
    assert second.shared == fresh.shared


def test_a_walk_in_between_does_not_hide_a_change() -> None:
    """A restore walks the state anew, after which everything looks unchanged since that walk."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    capture = StateCapture({"model": model, "optimizer": optimizer}, (), 0)
    first = capture.capture()
    train(model, optimizer)
    capture.refresh()
    second = capture.capture()
    assert second.generation > first.generation
    assert len(live(second, "optimizer.")) == 12


def test_what_has_not_changed_is_not_walked_again_to_be_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    capture = StateCapture({"model": model, "optimizer": optimizer}, (), 0)
    walks: list[object] = []
    real = modules.read_state_dict
    monkeypatch.setattr(modules, "read_state_dict", lambda *args: walks.append(args) or real(*args))
    capture.make_ready()
    capture.make_ready()
    assert len(walks) == 1
    train(model, optimizer)
    capture.make_ready()
    assert len(walks) == 2, "the optimizer has its state now"
    model.first.weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(UnsavableValueError, match=r"parameter 0 .* is not in the state"):
        capture.make_ready()


def test_an_optimizer_that_makes_its_state_at_the_first_step_is_noticed() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    capture = StateCapture({"model": model, "optimizer": optimizer}, (), 0)
    assert not live(capture.capture(), "optimizer.")
    assert optimizer.state == {}, "a capture makes no state"
    train(model, optimizer)
    assert len(live(capture.capture(), "optimizer.")) == 12


class Shampooish(torch.optim.Optimizer):
    """Keeps a counter that is no tensor, as many optimizers outside torch do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    state.setdefault("total", torch.zeros_like(parameter)).add_(parameter.grad)
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


def test_counters_of_an_optimizer_are_values() -> None:
    model = nn.Linear(4, 2)
    optimizer = Shampooish(model.parameters())
    train(model, optimizer, 3)
    capture = StateCapture({"model": model, "optimizer": optimizer}, (), 0)
    assert capture.capture().shared["optimizer"]["counters"] == {"weight.count": 3, "bias.count": 3}
    train(model, optimizer)
    captured = capture.capture()
    assert captured.generation == 1
    assert captured.shared["optimizer"]["counters"] == {"weight.count": 4, "bias.count": 4}


def test_hyperparameters_may_be_tensors() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    captured = StateCapture({"model": model, "optimizer": optimizer}, (), 0).capture()
    assert captured.shared["optimizer"]["param_groups"][0]["lr"] == {"$tensor": "optimizer.param_groups.0.lr"}
    assert captured.tensors["optimizer.param_groups.0.lr"] is optimizer.param_groups[0]["lr"]


def test_an_unsavable_value_is_named_by_key_path() -> None:
    capture = StateCapture({"loader": Counter(workers={"pool": object()})}, (), 0)
    with pytest.raises(UnsavableValueError, match=r"loader\.workers\.pool: .* hold a builtins\.object"):
        capture.capture()


def test_modules_and_optimizers_that_are_declared_per_rank_carry_the_ranks_names() -> None:
    model, optimizer = trained()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    state = {"model": model, "optimizer": optimizer, "other": nn.Linear(1, 1)}
    captured = StateCapture(state, ("model", "optimizer"), 3).capture()
    lr = captured.local["optimizer"]["param_groups"][0]["lr"]
    assert lr == {"$tensor": "per_rank.00003.optimizer.param_groups.0.lr"}
    assert lr["$tensor"] in captured.tensors
    own = {name for name in captured.tensors if not name.startswith("per_rank.00003.")}
    assert own == {"other.weight", "other.bias"}
    assert captured.fixed <= captured.tensors.keys()
    assert captured.guarded <= captured.fixed
    assert "optimizer" in captured.local
    assert "optimizer" not in captured.shared


@pytest.mark.parametrize("name", ["absent", "model", "mine"])
def test_rank0_names_values_of_the_state(name: str) -> None:
    state = {"model": torch.nn.Linear(1, 1), "mine": {"n": 1}, "log": {"n": 1}}
    with pytest.raises(UnsavableValueError, match=f"rank0 names '{name}'"):
        StateCapture(state, ("mine",), 0, (name,))


def test_only_rank_0_captures_what_it_alone_decides() -> None:
    state = {"log": {"t": torch.zeros(2), "n": 1}, "values": {"n": 2}}
    zero, one = (StateCapture(state, (), rank, ("log",)).capture() for rank in range(2))
    assert set(zero.shared) == {"log", "values"}
    assert set(one.shared) == {"values"}
    assert "log.t" in zero.tensors
    assert "log.t" not in one.tensors
