"""Optimizers: their state is data. It comes back into fresh objects bit for bit, or is refused."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from engine.errors import RestoreFailedError, StateMismatchError, UnsavableValueError
from engine.restore.destination import Destination
from engine.state.capture import StateCapture
from tests.support.checkpoint_in_memory import destination, restored, saved_of
from tests.support.training import differences, photograph, same_bits

State = dict[str, Any]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def step(module: nn.Module, optimizer: Optimizer, steps: int = 1) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        rows = torch.arange(6.0).view(2, 3) / (number + 2)
        module(rows).square().mean().backward()
        optimizer.step()


def made(make: Callable[[nn.Module], Optimizer], seed: int = 0, steps: int = 0) -> State:
    module = network(seed)
    optimizer = make(module)
    step(module, optimizer, steps)
    return {"model": module, "optimizer": optimizer}


def comes_back(make: Callable[[nn.Module], Optimizer], steps: int = 3) -> State:
    """Restore into fresh objects; state, groups and what follows must equal the undisturbed run."""
    one = made(make, steps=steps)
    two = restored(saved_of(one), made(make, seed=9))
    assert differences(photograph(two), photograph(one)) == []
    for state in (one, two):
        step(state["model"], state["optimizer"], 2)
    assert differences(photograph(two), photograph(one)) == []
    return two


KINDS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_objects_go_on_as_if_nothing_had_happened(kind: str) -> None:
    comes_back(KINDS[kind])


def test_restoring_never_steps() -> None:
    """Not with a learning rate of zero either: hooks run, and decay without a rate moves weights."""

    class Decaying(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            Decaying.steps += 1
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(0.5)
            return super().step(closure)

    one = made(lambda m: Decaying(m.parameters(), lr=0.1, momentum=0.9), steps=2)
    two = made(lambda m: Decaying(m.parameters(), lr=0.1, momentum=0.9), seed=3)
    two["optimizer"].register_step_pre_hook(lambda *_: pytest.fail("a hook ran"))
    two["model"][0].weight.grad = torch.full((4, 3), 2.0)
    Decaying.steps = 0
    restored(saved_of(one), two)
    assert Decaying.steps == 0
    assert differences(photograph(two), photograph(one)) == []
    assert bool((two["model"][0].weight.grad == 2).all())


def test_the_fields_of_a_live_parameter_keep_their_order() -> None:
    one = made(lambda m: torch.optim.AdamW(m.parameters()), steps=2)
    before = [list(entry) for entry in one["optimizer"].state.values()]
    assert before[0] != sorted(before[0])
    restored(saved_of(made(lambda m: torch.optim.AdamW(m.parameters()), steps=3)), one)
    assert [list(entry) for entry in one["optimizer"].state.values()] == before


def test_closures_are_not_called() -> None:
    one = made(lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2))

    def closure() -> torch.Tensor:
        one["optimizer"].zero_grad()
        loss = one["model"](torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    one["optimizer"].step(closure)
    one["optimizer"].step(closure)
    two = made(lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2), seed=5)
    two["optimizer"].register_step_pre_hook(lambda *_: pytest.fail("it was stepped"))
    restored(saved_of(one), two)
    assert differences(photograph(two), photograph(one)) == []


class EvalMode(Optimizer):
    """As schedulefree's: eval() puts the averages into the weights, and a step is refused until train()."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "train_mode": False})

    def _mix(self, weight: float, mode: bool) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["train_mode"] != mode and "z" in self.state[parameter]:
                    parameter.data.lerp_(self.state[parameter]["z"], weight)
            group["train_mode"] = mode

    def eval(self) -> None:
        self._mix(1 - 1 / 0.75, mode=False)

    def train(self) -> None:
        self._mix(1 - 0.75, mode=True)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["train_mode"], "a step in eval mode"
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.data.lerp_(z, 0.5)


@pytest.mark.parametrize("saved_in_eval", [True, False])
@pytest.mark.parametrize("stepped", [0, 1], ids=["fresh", "stepped"])
def test_optimizers_in_eval_mode(saved_in_eval: bool, stepped: int) -> None:
    """The live one is in the other mode, or in eval mode without any state."""

    def make(seed: int, steps: int, in_eval: bool) -> State:
        module = network(seed)
        optimizer = EvalMode(module.parameters())
        if steps:
            optimizer.train()
            step(module, optimizer, steps)
        if in_eval:
            optimizer.eval()
        return {"model": module, "optimizer": optimizer}

    one = make(0, 3, saved_in_eval)
    two = restored(saved_of(one), make(9, stepped, in_eval=not saved_in_eval))
    assert differences(photograph(two), photograph(one)) == []
    for state in (one, two):
        state["optimizer"].train()
        step(state["model"], state["optimizer"])
    assert differences(photograph(two), photograph(one)) == []


def test_sparse_gradients_and_parameters_without_one() -> None:
    def make() -> State:
        table, unused = nn.Embedding(5, 2, sparse=True), nn.Embedding(5, 2, sparse=True)
        module = nn.ModuleDict({"table": table, "unused": unused})
        return {"model": module, "optimizer": torch.optim.SparseAdam(module.parameters())}

    one = make()
    one["model"]["table"](torch.tensor([1, 3])).sum().backward()
    one["optimizer"].step()
    two = restored(saved_of(one), make())
    assert differences(photograph(two), photograph(one)) == []
    assert two["model"]["unused"].weight not in two["optimizer"].state


def test_frozen_parameters_keep_their_moments_and_stateless_ones_have_none() -> None:
    def make() -> State:
        return made(lambda m: torch.optim.AdamW(m.parameters()))

    one = make()
    one["model"][1].requires_grad_(False)
    step(one["model"], one["optimizer"])
    one["model"][0].bias.requires_grad_(False)
    two = make()
    for parameter in two["model"].parameters():
        parameter.requires_grad_(False)
    step(network(), two["optimizer"])
    assert differences(photograph(restored(saved_of(one), two)), photograph(one)) == []
    three = made(lambda m: torch.optim.AdamW(m.parameters()), steps=1)
    restored(saved_of(one), three)
    assert three["model"][1].weight not in three["optimizer"].state, "the saved state wins"


def test_a_state_that_was_looked_at_is_as_good_as_none() -> None:
    one = made(KINDS["AdamW"], steps=2)
    two = made(KINDS["AdamW"], seed=4)
    for parameter in two["model"].parameters():
        assert two["optimizer"].state[parameter] == {}
    assert differences(photograph(restored(saved_of(one), two)), photograph(one)) == []


def test_an_optimizer_that_has_state_for_some_of_its_parameters() -> None:
    one, two = made(KINDS["AdamW"], steps=2), made(KINDS["AdamW"], seed=4, steps=1)
    del two["optimizer"].state[two["model"][0].weight]
    two["optimizer"].state[two["model"][1].weight].clear()
    del two["optimizer"].state[two["model"][1].bias]["exp_avg_sq"]
    assert differences(photograph(restored(saved_of(one), two)), photograph(one)) == []


def test_live_state_is_filled_in_place_where_it_fits() -> None:
    one, two = made(KINDS["AdamW"], steps=2), made(KINDS["AdamW"], seed=2, steps=1)
    moment = two["optimizer"].state[two["model"][0].weight]["exp_avg"]
    restored(saved_of(one), two)
    assert two["optimizer"].state[two["model"][0].weight]["exp_avg"] is moment
    assert same_bits(moment, one["optimizer"].state[one["model"][0].weight]["exp_avg"])


def test_fields_that_are_born_later_come_back() -> None:
    """Numbers, None that becomes a tensor, lists that grow or shrink; and what is live only is dropped."""
    one, two = made(KINDS["SGD"], steps=1), made(KINDS["SGD"], steps=1)
    weight, bias = one["model"][0].weight, one["model"][0].bias
    one["optimizer"].state[weight].update(
        slow=torch.ones(4, 3), count=7, history=[torch.ones(2), None, {"t": torch.zeros(3)}], later=None
    )
    one["optimizer"].state[bias]["later"] = torch.zeros(4)
    one["optimizer"].state[bias]["shrunk"] = [torch.ones(1)]
    two["optimizer"].state[two["model"][0].weight].update(history=[], stale=1, slow=None)
    two["optimizer"].state[two["model"][0].bias].update(shrunk=[torch.zeros(1)] * 3, later=None)
    two["optimizer"].state[two["model"][1].bias]["mine"] = torch.zeros(2)
    restored(saved_of(one), two)
    assert differences(photograph(two), photograph(one)) == []


def test_dtypes_are_as_saved_whatever_the_parameters() -> None:
    def make() -> State:
        module = network().bfloat16()
        return {"model": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1)}

    one = make()
    for parameter in one["model"].parameters():
        shape = parameter.shape
        one["optimizer"].state[parameter] = {
            "exp_avg": torch.rand(shape),
            "quantized": torch.arange(parameter.numel(), dtype=torch.uint8).view(shape),
            "scale": torch.rand(3, dtype=torch.float64),
        }
    two = restored(saved_of(one), make())
    assert differences(photograph(two), photograph(one)) == []


def test_a_live_field_of_another_dtype_is_refused_by_name_and_nothing_changes() -> None:
    one, two = made(KINDS["AdamW"], steps=1), made(KINDS["AdamW"], seed=1, steps=2)
    entry = two["optimizer"].state[two["model"][0].bias]
    entry["exp_avg"] = entry["exp_avg"].bfloat16()
    before = photograph(two)
    with pytest.raises(
        StateMismatchError, match=r"optimizer.state.0.bias.exp_avg: saved as F32 .*, here BF16"
    ):
        restored(saved_of(one), two)
    assert differences(photograph(two), before) == []


def test_everything_in_the_state_is_saved_under_whatever_key() -> None:
    def make() -> State:
        return made(KINDS["momentum"])

    one = make()
    step(one["model"], one["optimizer"])
    state = one["optimizer"].state
    state["global"] = {"step": 3, "ema": torch.arange(3.0)}
    state[7] = None
    state["a", 1] = [torch.ones(2), "text"]
    state[one["model"][1].bias] = {0: {"exp_avg": torch.ones(2)}, 1: torch.zeros(1)}
    state["by parameter"] = {one["model"][0].weight: torch.full((4, 3), 5.0)}
    two = make()
    two["optimizer"].state["stale"] = 1
    restored(saved_of(one), two)
    live = two["optimizer"].state
    assert "stale" not in live
    assert (live["global"]["step"], live[7], live["a", 1][1]) == (3, None, "text")
    assert same_bits(live["global"]["ema"], torch.arange(3.0))
    assert same_bits(live[two["model"][1].bias][0]["exp_avg"], torch.ones(2))
    assert same_bits(live["by parameter"][two["model"][0].weight], torch.full((4, 3), 5.0))


def test_state_of_a_tensor_that_is_in_no_group_is_refused_at_once() -> None:
    state = made(KINDS["SGD"])
    state["optimizer"].state[torch.zeros(5)] = {"x": 1}
    with pytest.raises(UnsavableValueError, match=r"tensor of shape \[5\] that is in none of its groups"):
        saved_of(state)


class Around(Optimizer):
    """As SAM does it: the inner optimizer's groups are its own, the state is not."""

    def __init__(self, parameters: Any, **inner: Any) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **inner)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.detach().clone()
        return self.base_optimizer.step(closure)


def test_an_optimizer_inside_is_saved_with_it() -> None:
    two = comes_back(lambda m: Around(m.parameters(), lr=0.1, momentum=0.9))
    inner = two["optimizer"].base_optimizer
    assert all("momentum_buffer" in entry for entry in inner.state.values())
    one = made(lambda m: Around(m.parameters(), lr=0.1, momentum=0.9), steps=3)
    step(one["model"], one["optimizer"], 2)
    assert differences(inner.state_dict(), one["optimizer"].base_optimizer.state_dict()) == []


class Parts(Optimizer):
    """Steps optimizers that it keeps in a list or a dict, each over some of its parameters."""

    def __init__(self, parameters: Any, in_dict: bool) -> None:
        given = list(parameters)
        super().__init__(given, {"lr": 0.1})
        momentum = torch.optim.SGD(given[:2], lr=0.1, momentum=0.9)
        self.parts: Any = [momentum, torch.optim.AdamW(given[2:])]
        if in_dict:
            self.parts = dict(zip(("sgd", "adamw"), self.parts, strict=True))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts.values() if isinstance(self.parts, dict) else self.parts:
            part.step()


@pytest.mark.parametrize("in_dict", [False, True], ids=["list", "dict"])
def test_optimizers_inside_of_an_attribute_are_saved_with_it(in_dict: bool) -> None:
    comes_back(lambda m: Parts(m.parameters(), in_dict))


def test_an_optimizer_inside_over_other_tensors_is_refused() -> None:
    state = made(KINDS["SGD"])
    state["optimizer"].other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(UnsavableValueError, match="attribute other is a SGD over tensors that are not"):
        saved_of(state)


class Larc:
    """As apex's LARC: no Optimizer, and yet it steps one."""

    def __init__(self, optim: Optimizer) -> None:
        self.optim = optim

    @property
    def param_groups(self) -> Any:
        return self.optim.param_groups

    def state_dict(self) -> Any:
        return self.optim.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optim.load_state_dict(state)


def test_an_object_around_an_optimizer_is_saved_as_that() -> None:
    module = network().bfloat16()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.state[module[0].bias]["m"] = torch.full((4,), 1 / 3)
    fresh = network(1).bfloat16()
    two = Larc(torch.optim.SGD(reversed(list(fresh.parameters())), lr=0.2))
    restored(saved_of({"model": module, "optimizer": Larc(optimizer)}), {"model": fresh, "optimizer": two})
    assert same_bits(two.optim.state[fresh[0].bias]["m"], torch.full((4,), 1 / 3))
    assert len(two.optim.state) == 1, "by name, not by position"


class Own(torch.optim.Adam):
    """Saves more than its state and groups, by the position of its parameters."""

    def __init__(self, parameters: Any, **more: Any) -> None:
        super().__init__(parameters, **more)
        self.total = 0
        self.broken = False

    def step(self, closure: Any = None) -> Any:
        self.total += 1
        return super().step(closure)

    def state_dict(self) -> Any:
        return {**super().state_dict(), "total": self.total}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "total"})
        self.total = 0 if self.broken else state["total"]


def test_a_state_dict_of_its_own_is_gone_through() -> None:
    two = comes_back(lambda m: Own(m.parameters(), lr=0.1))
    assert two["optimizer"].total == 5


def test_torchs_cast_of_moments_is_undone() -> None:
    def make() -> State:
        module = network().bfloat16()
        return {"model": module, "optimizer": Own(module.parameters())}

    one = make()
    weight = one["model"][0].weight
    one["optimizer"].state[weight] = {"step": torch.tensor(1.0), "exp_avg": torch.rand(4, 3)}
    two = restored(saved_of(one), make())
    assert differences(photograph(two), photograph(one)) == []
    assert two["optimizer"].state[two["model"][0].weight]["exp_avg"].dtype == torch.float32


def test_what_its_own_load_state_dict_does_not_bring_back_is_an_error() -> None:
    one, two = made(lambda m: Own(m.parameters()), steps=2), made(lambda m: Own(m.parameters()))
    two["optimizer"].broken = True
    with pytest.raises(RestoreFailedError, match=r"optimizer\.total is 0, saved as 2"):
        restored(saved_of(one), two)


def test_a_state_dict_by_position_is_refused_in_another_order() -> None:
    one = made(lambda m: Own(m.parameters()), steps=1)
    two = made(lambda m: Own(reversed(list(m.parameters()))))
    before = photograph(two)
    with pytest.raises(StateMismatchError, match="by the position of its parameters"):
        restored(saved_of(one), two)
    assert differences(photograph(two), before) == []


def test_another_order_is_remapped() -> None:
    one = made(KINDS["AdamW"], steps=2)
    two = made(lambda m: torch.optim.AdamW(reversed(list(m.parameters())), lr=0.01), seed=1)
    restored(saved_of(one), two)
    for name, parameter in two["model"].named_parameters():
        other = one["optimizer"].state[one["model"].get_parameter(name)]
        assert differences(two["optimizer"].state[parameter], other) == []


def test_hooks_on_state_dicts_count_as_its_own() -> None:
    def make(module: nn.Module) -> Optimizer:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizer.mine = 0  # type: ignore[attr-defined]
        optimizer.register_state_dict_post_hook(lambda o, found: {**found, "mine": o.mine})
        optimizer.register_load_state_dict_pre_hook(lambda o, found: setattr(o, "mine", found["mine"]))
        return optimizer

    one, two = made(make), made(make)
    one["optimizer"].mine = 5
    assert restored(saved_of(one), two)["optimizer"].mine == 5


def test_several_modules_and_loose_parameters() -> None:
    """CLIP, SAC, GANs with shared parts: the names of all are found, and loose ones are entries."""

    def make(seed: int) -> State:
        torch.manual_seed(seed)
        image, text = nn.Linear(2, 2), nn.Linear(2, 2)
        temperature, extra = nn.Parameter(torch.rand(1)), {"alpha": nn.Parameter(torch.rand(3))}
        parameters = [*image.parameters(), *text.parameters(), temperature, extra["alpha"]]
        optimizer = torch.optim.AdamW(parameters)
        return {
            "image": image,
            "text": text,
            "temperature": temperature,
            "extra": extra,
            "optimizer": optimizer,
        }

    one, two = make(1), make(2)
    for state in (one, two):
        for parameter in state["optimizer"].param_groups[0]["params"]:
            parameter.grad = torch.rand_like(parameter)
        state["optimizer"].step()
    fresh = make(3)
    alpha = fresh["extra"]["alpha"]
    for state in (two, fresh):
        restored(saved_of(one), state)
        assert differences(photograph(state), photograph(one)) == []
    assert fresh["extra"]["alpha"] is alpha, "the optimizer steps this very parameter"


def test_two_optimizers_that_share_a_part_of_their_modules() -> None:
    """A GAN whose generator and discriminator have one encoder: its moments are each optimizer's own."""

    def make(seed: int) -> State:
        torch.manual_seed(seed)
        encoder = nn.Linear(3, 3)
        state: State = {
            "g": nn.Sequential(encoder, nn.Linear(3, 3)),
            "d": nn.Sequential(encoder, nn.Linear(3, 1)),
        }
        return state | {f"optimizer_{key}": torch.optim.Adam(state[key].parameters()) for key in "gd"}

    one, two = make(1), make(2)
    for count, key in enumerate("gd", start=1):
        step(one[key], one[f"optimizer_{key}"], count)
    restored(saved_of(one), two)
    assert differences(photograph(two), photograph(one)) == []
    assert two["g"][0].weight is two["d"][0].weight


@pytest.mark.parametrize("nested", [False, True], ids=["entry", "nested"])
def test_a_state_dict_in_place_of_the_optimizer_is_refused_at_construction(nested: bool) -> None:
    state = made(KINDS["AdamW"], steps=1)
    stale = state["optimizer"].state_dict()
    entry: State = {"optimizer": {"inner": stale}} if nested else {"optimizer": stale}
    with pytest.raises(UnsavableValueError, match=r"goes stale as training goes on.*the optimizer itself"):
        StateCapture({"model": state["model"], **entry}, (), 0)


@pytest.mark.parametrize("entry", [list, lambda found: {"a": found[0]}], ids=["list", "dict"])
def test_optimizers_inside_of_a_list_or_dict_are_refused_at_construction(entry: Any) -> None:
    state = made(KINDS["SGD"])
    with pytest.raises(UnsavableValueError, match="give each optimizer a key of its own"):
        StateCapture({"model": state["model"], "optimizers": entry([state["optimizer"]])}, (), 0)


def test_a_list_that_holds_itself_is_not_walked_for_ever() -> None:
    endless: list[Any] = []
    endless.append(endless)
    StateCapture({"values": endless}, (), 0)


def tied(share: bool) -> State:
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    if share:
        module["b"].weight = module["a"].weight
    return {"model": module, "optimizer": torch.optim.AdamW(module.parameters())}


def tied_step(state: State) -> State:
    module = state["model"]
    (module["a"](torch.ones(1, 2)) + module["b"](torch.ones(1, 2))).sum().backward()
    state["optimizer"].step()
    return state


def test_moments_follow_weights_that_are_not_tied_any_more() -> None:
    one, two = tied_step(tied(share=True)), tied(share=False)
    restored(saved_of(one), two)
    moment = one["optimizer"].state[one["model"]["a"].weight]["exp_avg"]
    for part in "ab":
        assert same_bits(two["optimizer"].state[two["model"][part].weight]["exp_avg"], moment)
    ours = [two["optimizer"].state[two["model"][part].weight]["exp_avg"].data_ptr() for part in "ab"]
    assert len(set(ours)) == 2


def test_moments_of_a_weight_that_is_tied_now_are_not_lost_silently() -> None:
    with pytest.raises(StateMismatchError, match=r"optimizer\.state\.b\.weight\.exp_avg"):
        restored(saved_of(tied_step(tied(share=False))), tied(share=True))


def grouped(*groups: tuple[str, dict[str, Any]], seed: int = 0) -> State:
    module = network(seed)
    named = dict(module.named_parameters())
    parts = [{"params": [named[name] for name in names.split()], **hyper} for names, hyper in groups]
    return {"model": module, "optimizer": torch.optim.AdamW(parts, lr=0.5)}


WEIGHTS, BIASES = "0.weight 1.weight", "0.bias 1.bias"


def hyper(state: State, name: str) -> dict[str, Any]:
    """Parameter name -> hyperparameter."""
    names = {parameter: at for at, parameter in state["model"].named_parameters()}
    return {names[p]: g[name] for g in state["optimizer"].param_groups for p in g["params"]}


def test_hyperparameters_belong_to_parameters() -> None:
    one = grouped((WEIGHTS, {"weight_decay": 0.1, "lr": 0.3}), (BIASES, {"weight_decay": 0.0}))
    step(one["model"], one["optimizer"])
    turned = grouped((BIASES, {}), (WEIGHTS, {}))
    restored(saved_of(one), turned)
    assert hyper(turned, "weight_decay") == hyper(one, "weight_decay")
    assert hyper(turned, "lr") == hyper(one, "lr")
    alike = grouped((WEIGHTS, {}), (BIASES, {}))
    merged = restored(saved_of(alike), grouped((f"{WEIGHTS} {BIASES}", {"lr": 0.9})))
    assert set(hyper(merged, "lr").values()) == {0.5}
    split = restored(saved_of(merged), grouped((WEIGHTS, {"lr": 0.7}), (BIASES, {"lr": 0.7})))
    assert set(hyper(split, "lr").values()) == {0.5}


def test_a_split_that_would_change_a_live_value_shows_both_and_keeps_them_on_demand() -> None:
    one = grouped((f"{WEIGHTS} {BIASES}", {"weight_decay": 0.1, "lr": 0.25}))
    step(one["model"], one["optimizer"])

    def make() -> State:
        return grouped((WEIGHTS, {"weight_decay": 0.1}), (BIASES, {"weight_decay": 0.0}), seed=3)

    two = make()
    before = photograph(two)
    with pytest.raises(StateMismatchError, match=r"weight_decay of group 1 .* is 0\.0 here and was 0\.1"):
        restored(saved_of(one), two)
    assert differences(photograph(two), before) == []
    restored(saved_of(one), two, exclude=("optimizer.param_groups.weight_decay",))
    assert set(hyper(two, "weight_decay").values()) == {0.0, 0.1}
    assert set(hyper(two, "lr").values()) == {0.25}
    assert two["optimizer"].state


def test_a_merge_of_groups_that_differ_shows_both_values() -> None:
    one = grouped((WEIGHTS, {"lr": 0.1}), (BIASES, {"lr": 0.2}))
    with pytest.raises(StateMismatchError, match=r"lr of group 0 was 0\.1 for .* and 0\.2 for"):
        restored(saved_of(one), grouped((f"{WEIGHTS} {BIASES}", {})))


def test_how_a_step_is_carried_out_stays_the_live_optimizers() -> None:
    one = made(lambda m: torch.optim.AdamW(m.parameters(), foreach=False, amsgrad=True), steps=1)
    two = made(lambda m: torch.optim.AdamW(m.parameters(), fused=True))
    restored(saved_of(one), two)
    (group,) = two["optimizer"].param_groups
    assert (group["foreach"], group["fused"], group["amsgrad"]) == (None, True, True)


@pytest.mark.parametrize(
    "saved", [0.25, torch.tensor(0.25), np.float64(0.25)], ids=["float", "tensor", "numpy"]
)
@pytest.mark.parametrize("live", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_a_rate_is_a_number_or_a_tensor(saved: Any, live: Any) -> None:
    one = made(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    one["optimizer"].param_groups[0]["lr"] = copy.deepcopy(saved)
    two = made(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    two["optimizer"].param_groups[0]["lr"] = mine = copy.deepcopy(live)
    restored(saved_of(one), two)
    rate = two["optimizer"].param_groups[0]["lr"]
    assert float(rate) == 0.25
    assert (rate is mine) if isinstance(live, torch.Tensor) else type(rate) is type(saved)


def test_a_rate_that_a_live_tensor_would_round_is_refused() -> None:
    one = made(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    two = made(lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.1)), seed=3)
    before = photograph(two)
    with pytest.raises(StateMismatchError, match=r"lr of group 0 was 0\.1 when saved, .* would round"):
        restored(saved_of(one), two)
    assert differences(photograph(two), before) == []
    restored(saved_of(one), two, exclude=("optimizer.param_groups.lr",))
    assert torch.equal(two["optimizer"].param_groups[0]["lr"], torch.tensor(0.1))


def test_a_group_of_parameters_that_had_none_keeps_its_values_and_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = grouped((WEIGHTS, {"lr": 0.3}))
    step(one["model"], one["optimizer"])
    two = restored(saved_of(one), grouped((WEIGHTS, {}), (BIASES, {"lr": 0.7})))
    assert set(hyper(two, "lr").values()) == {0.3, 0.7}
    (told,) = caplog.messages
    assert "optimizer: group 1 keeps its live values, because 0.bias, 1.bias had no group when saved" in told


def test_another_class_of_optimizer_is_refused_and_left_alone() -> None:
    one, two = made(KINDS["momentum"], steps=1), made(KINDS["AdamW"], steps=1)
    before = photograph(two)
    with pytest.raises(StateMismatchError, match="optimizer: saved from a SGD, here a AdamW"):
        restored(saved_of(one), two)
    restored(saved_of(one), two, strict=False)
    assert differences(photograph(two)["optimizer"], before["optimizer"]) == []


def test_what_was_saved_for_a_parameter_that_is_not_stepped_here_is_refused() -> None:
    one = made(KINDS["AdamW"], steps=1)
    two = made(lambda m: torch.optim.AdamW(m[0].parameters(), lr=0.01))
    with pytest.raises(StateMismatchError, match=r"optimizer\.state\.1\.weight\.exp_avg"):
        restored(saved_of(one), two)


def test_what_is_excluded_keeps_its_live_value() -> None:
    one, two = made(KINDS["AdamW"], steps=3), made(KINDS["AdamW"], seed=1, steps=1)
    before = photograph(two)
    patterns = ("optimizer.state.0.*", "optimizer.param_groups.*", "model.1.bias")
    restored(saved_of(one), two, exclude=patterns)
    assert same_bits(two["model"][1].bias, before["model"]["1.bias"]), "its moments are restored, it is not"
    assert same_bits(two["model"][1].weight, one["model"][1].weight)
    names = {parameter: name for name, parameter in two["model"].named_parameters()}
    for number, (parameter, entry) in enumerate(two["optimizer"].state.items()):
        other = one["optimizer"].state[one["model"].get_parameter(names[parameter])]
        same_as = before["optimizer"]["state"][number] if names[parameter].startswith("0.") else other
        assert differences(entry, same_as) == []


def test_an_unfit_checkpoint_leaves_no_trace() -> None:
    one = {**made(KINDS["AdamW"], steps=1), "other": {"n": 1}}
    two = {**made(KINDS["AdamW"], seed=1), "other": [1]}
    for parameter in two["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    before = photograph(two)
    with pytest.raises(StateMismatchError):
        restored(saved_of(one), two)
    assert differences(photograph(two), before) == []
    assert not two["optimizer"].state
    assert all(bool((parameter.grad == 1).all()) for parameter in two["model"].parameters())


def test_a_kept_walk_notices_a_field_that_has_become_a_tensor() -> None:
    state = made(KINDS["SGD"])
    weight = state["model"][0].weight
    state["optimizer"].state[weight]["slow"] = None
    capture = StateCapture(state, (), 0)
    capture.capture()
    state["optimizer"].state[weight]["slow"] = torch.ones(4, 3)
    assert "optimizer.state.0.weight.slow" in capture.capture().fixed


def test_a_kept_walk_lasts_while_only_numbers_change() -> None:
    state = made(KINDS["AdamW"], steps=1)
    state["optimizer"].state["global_step"] = 1
    capture = StateCapture(state, (), 0)
    first = capture.capture().generation
    state["optimizer"].state["global_step"] = 2
    step(state["model"], state["optimizer"])
    again = capture.capture()
    assert again.generation == first
    assert again.shared["optimizer"]["more"]["$mapping"]["pairs"] == [["extra", [["global_step", 2]]]]


def test_the_destination_makes_state_and_installs_it_at_the_end_only() -> None:
    one, two = made(KINDS["AdamW"], steps=1), made(KINDS["AdamW"])
    found: Destination = destination(two, saved_of(one))
    found.check("it")
    assert found.tensors["optimizer.state.0.weight.exp_avg"].shape == (4, 3)
    assert not two["optimizer"].state


class Lookahead(Optimizer):
    """As the first published ones: slow weights under `id()`s in the state dict, a count in an attribute."""

    def __init__(self, optimizer: Optimizer, k: int = 2) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.defaults = optimizer.defaults
        self.param_groups = optimizer.param_groups
        self.state = collections.defaultdict(dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                entry = self.state[parameter]
                if "slow" not in entry:
                    entry["slow"] = parameter.detach().clone()
                if self.count % self.k == 0:
                    entry["slow"] += 0.5 * (parameter.detach() - entry["slow"])
                    parameter.data.copy_(entry["slow"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        slow = {id(parameter): entry for parameter, entry in self.state.items()}
        return {"slow_state": slow, "fast_state": self.optimizer.state_dict(), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]
        self.optimizer.load_state_dict(state["fast_state"])
        self.param_groups = self.optimizer.param_groups
        by_id = {id(p): p for group in self.param_groups for p in group["params"]}
        self.state = collections.defaultdict(dict)
        self.state.update({by_id[key]: entry for key, entry in state["slow_state"].items()})


def test_a_state_dict_with_ids_of_parameters_comes_back() -> None:
    two = made(lambda m: Lookahead(torch.optim.Adam(m.parameters(), lr=0.1)), steps=3)
    fresh = made(lambda m: Lookahead(torch.optim.Adam(m.parameters(), lr=0.1)), seed=5)
    restored(saved_of(two), fresh)
    assert fresh["optimizer"].count == 3
    for state in (two, fresh):
        step(state["model"], state["optimizer"], 2)
    for one, other in zip(two["model"].parameters(), fresh["model"].parameters(), strict=True):
        assert same_bits(one, other)
        slow = [state["optimizer"].state[p]["slow"] for state, p in ((two, one), (fresh, other))]
        assert same_bits(*slow)


def test_state_under_the_id_of_a_parameter_comes_back_under_its_id() -> None:
    one, two = made(KINDS["SGD"]), made(KINDS["SGD"])
    one["optimizer"].state[id(one["model"][0].weight)] = torch.ones(2)
    restored(saved_of(one), two)
    assert same_bits(two["optimizer"].state[id(two["model"][0].weight)], torch.ones(2))
    assert len(two["optimizer"].state) == 1


class Several:
    """Steps a list of optimizers: no optimizer itself, and torch casts what it loads."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = list(optimizers)

    def state_dict(self) -> Any:
        return {"all": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: Any) -> None:
        for optimizer, own in zip(self.optimizers, state["all"], strict=True):
            optimizer.load_state_dict(own)


def test_what_an_object_with_optimizers_inside_loads_is_not_cast() -> None:
    def make() -> State:
        module = network().bfloat16()
        parts = [torch.optim.SGD(part.parameters(), lr=0.1) for part in module]
        return {"model": module, "optimizers": Several(*parts)}

    one = make()
    for part, optimizer in zip(one["model"], one["optimizers"].optimizers, strict=True):
        for parameter in part.parameters():
            optimizer.state[parameter] = {"moment": torch.rand(parameter.shape), "n": 1}
    two = restored(saved_of(one), make())
    assert differences(photograph(two), photograph(one)) == []
    assert two["optimizers"].optimizers[1].state[two["model"][1].bias]["moment"].dtype == torch.float32


def test_live_fields_that_share_memory_are_not_read_into_twice() -> None:
    one, two = made(KINDS["SGD"]), made(KINDS["SGD"])
    one["optimizer"].state[one["model"][0].bias].update(fast=torch.ones(4), slow=torch.zeros(4))
    shared = torch.full((4,), 9.0)
    two["optimizer"].state[two["model"][0].bias].update(fast=shared, slow=shared)
    restored(saved_of(one), two)
    assert differences(photograph(two), photograph(one)) == []


def test_without_strictness_a_parameter_that_is_new_keeps_its_state() -> None:
    one, two = made(KINDS["AdamW"], steps=1), made(KINDS["AdamW"])
    extra = nn.Parameter(torch.zeros(2))
    two["extra"] = extra
    two["optimizer"].add_param_group({"params": [extra]})
    two["optimizer"].state[extra]["mine"] = 5
    restored(saved_of(one), two, strict=False)
    assert two["optimizer"].state[extra] == {"mine": 5}
    assert "exp_avg" in two["optimizer"].state[two["model"][0].weight]


def test_a_part_of_an_optimizer_does_not_go_through_its_own_load_state_dict(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It knows no parts: what is left out would be lost."""
    one, two = made(lambda m: Own(m.parameters()), steps=3), made(lambda m: Own(m.parameters()), steps=1)
    moment = two["optimizer"].state[two["model"][0].weight]["exp_avg"].clone()
    restored(saved_of(one), two, exclude=("optimizer.state.0.weight.*",))
    assert same_bits(two["optimizer"].state[two["model"][0].weight]["exp_avg"], moment)
    assert two["optimizer"].total == 1
    assert "what its own state_dict() holds besides state and groups was not restored" in caplog.text


def test_state_comes_in_the_order_of_the_parameters() -> None:
    """Not in that of a set of names, which differs from process to process: some sum over all state."""
    two = restored(saved_of(made(KINDS["AdamW"], steps=1)), made(KINDS["AdamW"]))
    assert list(map(id, two["optimizer"].state)) == list(map(id, two["model"].parameters()))


@pytest.mark.parametrize(
    ("include", "rate", "extra", "count", "moments"),
    [
        (("optimizer",), 0.5, "saved", 5, True),
        (("optimizer.*",), 0.5, "saved", 5, True),
        (("optimizer.param_groups.*",), 0.5, "live", None, False),
        (("optimizer.param_groups.lr",), 0.5, "live", None, False),
        (("optimizer.state.*",), 0.1, "saved", 5, True),
        (("optimizer.state.extra",), 0.1, "saved", None, False),
        (("optimizer.state.0.bias.count",), 0.1, "live", 5, False),
        (("model",), 0.1, "live", None, False),
    ],
)
def test_what_is_included_of_an_optimizer(
    include: tuple[str, ...], rate: float, extra: str, count: int | None, moments: bool
) -> None:
    def make() -> State:
        return made(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))

    one, two = make(), make()
    step(one["model"], one["optimizer"])
    one["optimizer"].param_groups[0]["lr"] = 0.5
    one["optimizer"].state[one["model"][0].bias]["count"] = 5
    one["optimizer"].state["extra"], two["optimizer"].state["extra"] = "saved", "live"
    restored(saved_of(one), two, include=include)
    state = two["optimizer"].state
    assert two["optimizer"].param_groups[0]["lr"] == rate
    assert state["extra"] == extra
    assert state.get(two["model"][0].bias, {}).get("count") == count
    assert ("momentum_buffer" in state.get(two["model"][1].weight, {})) == moments


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(24.0).view(2, 3, 4).mT,
    ],
    ids=["other shape", "shape of the parameter", "three dimensions"],
)
def test_strides_of_state_come_back(value: torch.Tensor) -> None:
    """Products of matrices round by them, and what follows has to be equal to the bit."""
    one, two = made(KINDS["SGD"]), made(KINDS["SGD"])
    one["optimizer"].state[one["model"][0].weight]["factor"] = value
    restored(saved_of(one), two)
    found = two["optimizer"].state[two["model"][0].weight]["factor"]
    assert found.stride() == value.stride()
    assert same_bits(found, value)


def test_strides_of_a_tensor_with_holes_are_not_kept() -> None:
    one, two = made(KINDS["SGD"]), made(KINDS["SGD"])
    one["optimizer"].state[one["model"][0].weight]["row"] = torch.arange(8.0)[::2]
    restored(saved_of(one), two)
    found = two["optimizer"].state[two["model"][0].weight]["row"]
    assert (found.tolist(), found.stride()) == ([0, 2, 4, 6], (1,))


class Counting(torch.optim.SGD):
    """One count for all parameters, in the state of each; the first one's step changes it."""

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        first = self.state[group["params"][0]]
        first.setdefault("count", torch.zeros(()))
        first["again"] = first["count"].add_(1)
        for parameter in group["params"]:
            self.state[parameter].setdefault("count", first["count"])
            parameter.data.mul_(1 - 0.1 / self.state[parameter]["count"])
        return super().step(closure)


@pytest.mark.parametrize("live", ["fresh", "stepped", "reversed"])
def test_a_state_tensor_of_several_parameters_stays_one(live: str) -> None:
    """Apart, only one of them would go on counting."""
    one = made(lambda m: Counting(m.parameters(), lr=0.1), steps=3)
    module = network(seed=9)
    parameters = list(module.parameters())
    other = Counting(parameters[::-1] if live == "reversed" else parameters, lr=0.1)
    if live == "stepped":
        step(module, other)
    two = restored(saved_of(one), {"model": module, "optimizer": other})
    counts = [state["count"] for state in other.state.values()]
    assert all(count is counts[0] for count in counts)
    assert counts[0].item() == 3
    if live != "reversed":
        assert other.state[parameters[0]]["again"] is counts[0]
        for state in (one, two):
            step(state["model"], state["optimizer"], 2)
        assert differences(photograph(two), photograph(one)) == []


def test_state_tensors_that_were_apart_are_apart_again() -> None:
    module = network()
    optimizer = Counting(module.parameters(), lr=0.1)
    step(module, optimizer)
    for state in optimizer.state.values():
        state["count"] = state["count"].clone()
    other = made(lambda m: Counting(m.parameters(), lr=0.1), steps=1)
    restored(saved_of({"model": module, "optimizer": optimizer}), other)
    counts = {id(state["count"]) for state in other["optimizer"].state.values()}
    assert len(counts) == 4


class SlowWeights(torch.optim.SGD):
    """Lookahead as it is often written: the slow weights are in an attribute, where nothing saves them."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        self.scratch = torch.zeros(1, dtype=torch.int32)  # a flag for a kernel
        self.views = [p.detach().view(-1) for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group, slow in zip(self.param_groups, self.slow_weights, strict=True):
            for parameter, weight in zip(group["params"], slow, strict=True):
                weight.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(weight)
        return loss


def test_tensors_in_an_optimizers_attributes_are_refused_or_entries_of_the_state() -> None:
    one = made(lambda m: SlowWeights(m.parameters(), lr=0.1), steps=2)
    with pytest.raises(
        UnsavableValueError, match=r"its attribute slow_weights\.0\.0, .* would be lost"
    ):
        saved_of(one)
    two = made(lambda m: SlowWeights(m.parameters(), lr=0.1), seed=9)
    for state in (one, two):
        state["slow"] = state["optimizer"].slow_weights
    restored(saved_of(one), two)
    for state in (one, two):
        step(state["model"], state["optimizer"], 2)
    assert differences(photograph(two), photograph(one)) == []


@pytest.mark.parametrize("empty", [1, 2])
def test_a_group_without_parameters_keeps_its_values(empty: int) -> None:
    """Those that share out parameters by a rule have one now and then, and schedulers go on from its lr."""

    def groups(module: nn.Module, lr: float) -> list[dict[str, Any]]:
        few = [{"params": [], "lr": lr * (number + 2)} for number in range(empty)]
        return [few[0], {"params": module.parameters(), "lr": lr}, *few[1:]]

    one = made(lambda m: torch.optim.SGD(groups(m, 0.1)))
    two = restored(saved_of(one), made(lambda m: torch.optim.SGD(groups(m, 5.0))))
    rates = [[group["lr"] for group in state["optimizer"].param_groups] for state in (one, two)]
    assert rates[0] == rates[1]


def test_a_state_tensor_of_several_parameters_stays_one_under_other_names() -> None:
    one = made(lambda m: Counting(m.parameters(), lr=0.1), steps=3)
    module = nn.ModuleDict({"inner": network(seed=9)})
    other = Counting(module.parameters(), lr=0.1)
    restored(saved_of(one), {"model": module, "optimizer": other}, rename={"model": "model.inner"})
    counts = [state["count"] for state in other.state.values()]
    assert len(counts) == 4
    assert all(count is counts[0] for count in counts)


class Counted(torch.optim.SGD):
    """Keeps a count where nothing saves it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.every, self.count = 5, 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


def test_a_number_that_is_lost_in_an_attribute_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    one = made(lambda m: Counted(m.parameters()))
    capture = StateCapture(one, (), 0)
    capture.capture()
    assert not caplog.messages
    for _ in range(2):
        step(one["model"], one["optimizer"])
        one["optimizer"].load_state_dict(one["optimizer"].state_dict())  # walked anew
        capture.capture()
    (told,) = caplog.messages
    assert "optimizer: the attribute count of the Counted has changed from 0 to 1" in told
