"""Save and restore in one process: any state is restored bit by bit, into fresh objects."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

from engine import Checkpointer
from engine.directory.listing import read_manifest
from engine.errors import UnsavableValueError
from engine.state import rng
from engine.storage.local import LocalStorage
from tests.support.training import differences, model, photograph, same_bits, train

State = dict[str, Any]


@pytest.fixture(autouse=True)
def _leave_the_generators_alone() -> Iterator[None]:
    before = rng.capture()
    yield
    rng.restore(before)


def saved(directory: Path, state: State, step: int = 1, **more: Any) -> str:
    """Save once and return the checkpoint's id."""
    with Checkpointer(directory, state, **more) as checkpointer:
        record = checkpointer.save(step).result(60)
    assert record is not None
    return record.id


def restored(directory: Path, state: State, **more: Any) -> State:
    with Checkpointer(directory, state, **more) as checkpointer:
        assert checkpointer.restore("latest") is not None
    return state


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "lr-tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
}


def training_state(optimizer: str, seed: int) -> State:
    network = model(seed)
    return {"model": network, "optimizer": OPTIMIZERS[optimizer](network.parameters())}


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(
    optimizer: str, steps_before: int, tmp_path: Path
) -> None:
    """Also when saved before the first step: no optimizer state is made up."""
    state = training_state(optimizer, seed=1)
    train(*state.values(), steps_before)
    saved(tmp_path, state)
    expected = photograph(state)
    losses = train(*state.values(), 3)
    final = photograph(state)

    other = training_state(optimizer, seed=2)
    restored(tmp_path, other)
    assert differences(photograph(other), expected) == []
    assert train(*other.values(), 3) == losses
    assert differences(photograph(other), final) == []


def test_going_back_in_the_same_process(tmp_path: Path) -> None:
    state = training_state("adamw", 1)
    train(*state.values(), 2)
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(2)
        expected = photograph(state)
        losses = train(*state.values(), 3)
        checkpointer.restore("latest")
        assert differences(photograph(state), expected) == []
        assert train(*state.values(), 3) == losses


def test_going_back_to_before_the_first_step_forgets_the_optimizers_state(tmp_path: Path) -> None:
    state = training_state("adamw", 1)
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(0)
        losses = train(*state.values(), 2)
        checkpointer.restore("latest")
        assert state["optimizer"].state_dict()["state"] == {}
        assert train(*state.values(), 2) == losses


def test_a_save_after_a_restore_holds_what_the_restore_made(tmp_path: Path) -> None:
    """The optimizer gets its state by the restore: the next save must see it."""
    state = training_state("adamw", 1)
    train(*state.values(), 2)
    saved(tmp_path, state, 2)
    other = training_state("adamw", 2)
    with Checkpointer(tmp_path, other) as checkpointer:
        checkpointer.save(0).result(60)
        checkpointer.restore("step:2")
        train(*other.values())
        expected = photograph(other)
        checkpointer.save(3).result(60)
    third = restored(tmp_path, training_state("adamw", 3))
    assert differences(photograph(third), expected) == []


def test_restoring_an_optimizer_takes_no_step_and_keeps_gradients(tmp_path: Path) -> None:
    state = training_state("sgd-decay", 1)
    train(*state.values(), 2)
    saved(tmp_path, state)
    other = training_state("sgd-decay", 2)
    gradients = {name: torch.randn_like(p) for name, p in other["model"].named_parameters()}
    for name, parameter in other["model"].named_parameters():
        parameter.grad = gradients[name].clone()
    restored(tmp_path, other)
    for name, parameter in other["model"].named_parameters():
        assert parameter.grad is not None
        assert same_bits(parameter.grad, gradients[name])


def test_parameters_without_gradients_have_no_state_after_a_restore(tmp_path: Path) -> None:
    def make() -> State:
        network = nn.ModuleDict({"used": model(), "unused": nn.Linear(2, 2)})
        return {"model": network, "optimizer": torch.optim.AdamW(network.parameters())}

    state = make()
    train(state["model"]["used"], state["optimizer"], 2)
    saved(tmp_path, state)
    other = restored(tmp_path, make())
    assert other["model"]["unused"].weight not in other["optimizer"].state
    assert differences(photograph(other), photograph(state)) == []


def test_parameter_groups_keep_their_own_hyperparameters(tmp_path: Path) -> None:
    def make(lr: float) -> State:
        network = model()
        decayed = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": lr},
            {"params": others, "lr": lr / 2, "betas": (lr, 0.5)},
        ]
        return {"model": network, "optimizer": torch.optim.AdamW(groups, lr=lr)}

    state = make(0.25)
    train(*state.values())
    saved(tmp_path, state)
    other = restored(tmp_path, make(0.125))
    assert differences(photograph(other), photograph(state)) == []
    assert other["optimizer"].param_groups[1]["betas"] == (0.25, 0.5)


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor(tmp_path: Path) -> None:
    state = training_state("lr-tensor", 1)
    state["optimizer"].param_groups[0]["lr"].fill_(0.5)
    saved(tmp_path, state)
    other = training_state("lr-tensor", 2)
    rate = other["optimizer"].param_groups[0]["lr"]
    restored(tmp_path, other)
    assert other["optimizer"].param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3, 5], 0.5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, cooldown=1, factor=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_schedules(schedule: str, tmp_path: Path) -> None:
    def make(seed: int) -> State:
        network = model(seed)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        return {"model": network, "optimizer": optimizer, "schedule": SCHEDULES[schedule](optimizer)}

    state = make(1)
    train(state["model"], state["optimizer"], 3, schedule=state["schedule"])
    saved(tmp_path, state)
    expected = photograph(state)
    losses = train(state["model"], state["optimizer"], 4, schedule=state["schedule"])
    rate = state["optimizer"].param_groups[0]["lr"]
    other = restored(tmp_path, make(2))
    assert differences(photograph(other), expected) == []
    assert train(other["model"], other["optimizer"], 4, schedule=other["schedule"]) == losses
    assert other["optimizer"].param_groups[0]["lr"] == rate


TENSORS = {
    "f64": torch.randn(3, 4, dtype=torch.float64),
    "f32-special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "bf16": torch.randn(7).to(torch.bfloat16),
    "f16": torch.randn(7).to(torch.float16),
    "f8": torch.randn(7).to(torch.float8_e4m3fn),
    "f8-fnuz": torch.randn(7).to(torch.float8_e5m2fnuz),
    "f4": torch.arange(6, dtype=torch.uint8).view(2, 3).view(torch.float4_e2m1fn_x2),
    "f8-e8m0": torch.ones(7).to(torch.float8_e8m0fnu),
    "c64": torch.randn(7, dtype=torch.complex64),
    "i64": torch.tensor([2**63 - 1, -(2**63)]),
    "i32": torch.arange(5, dtype=torch.int32),
    "i16": torch.arange(5, dtype=torch.int16),
    "i8": torch.arange(-3, 3, dtype=torch.int8),
    "u8": torch.arange(5, dtype=torch.uint8),
    "u16": torch.arange(5).to(torch.uint16),
    "u64": torch.arange(5).to(torch.uint64),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "scalar-bool": torch.tensor(True),
    "empty": torch.zeros(0),
    "empty-2d": torch.zeros(3, 0, dtype=torch.int64),
    "one": torch.ones(1, 1, 1),
    "large": torch.randn(300, 1000),
}


def test_tensors_of_every_kind_in_plain_values(tmp_path: Path) -> None:
    state: State = {"values": {name: tensor.clone() for name, tensor in TENSORS.items()}}
    saved(tmp_path, state)
    # Into tensors of the same kind, in place; and into nothing, as new ones.
    blank = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    for values in (dict(blank), {}):
        restored(tmp_path, {"values": values})
        assert differences(values, TENSORS) == []
    assert values["large"] is not blank["large"]


def test_tensors_inside_values_are_read_in_place_where_they_fit(tmp_path: Path) -> None:
    saved(tmp_path, {"values": {"a": torch.ones(3), "b": torch.ones(3)}})
    mine = {"a": torch.zeros(3), "b": torch.zeros(4)}
    there = dict(mine)
    restored(tmp_path, {"values": mine})
    assert there["a"].tolist() == [1, 1, 1]
    assert mine["a"].data_ptr() == there["a"].data_ptr()
    assert there["b"].tolist() == [0, 0, 0, 0]
    assert mine["b"].tolist() == [1, 1, 1]


def test_plain_entries_of_the_state(tmp_path: Path) -> None:
    def make(n: int) -> State:
        return {
            "scale": torch.full((2,), float(n)),
            "scalar": torch.tensor(n),
            "flags": {"done": n > 1, "nested": {"t": (n, "x", None)}, 3: "three"},
            "history": [n, torch.full((n,), n), {"loss": float(n)}],
            "empty": {},
        }

    saved(tmp_path, make(2))
    other = make(1)
    scale, history = other["scale"], other["history"]
    restored(tmp_path, other)
    assert differences(other, make(2)) == []
    assert other["scale"] is scale
    assert other["history"] is history


class Loader:
    """An object of the caller's own that draws random numbers whenever it is asked or told anything."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.table = torch.full((3,), position)

    def state_dict(self) -> State:
        torch.rand(3)
        random.random()
        return {"position": self.position, "table": self.table}

    def load_state_dict(self, state: State) -> None:
        np.random.rand(3)
        torch.rand(5)
        self.position, self.table = state["position"], state["table"]


def test_generators_come_out_first_and_go_in_last(tmp_path: Path) -> None:
    state: State = {"loader": Loader(7)}
    rng.derive(1, 2, 3)
    with Checkpointer(tmp_path, state) as checkpointer:
        before = rng.capture()
        checkpointer.save(1).result(60)
    rng.restore(before)
    numbers = [random.random(), float(np.random.rand()), torch.rand(2).tolist()]
    other: State = {"loader": Loader(0)}
    restored(tmp_path, other)
    assert [random.random(), float(np.random.rand()), torch.rand(2).tolist()] == numbers
    assert other["loader"].position == 7
    assert other["loader"].table.tolist() == [7, 7, 7]


def test_the_snapshot_is_of_the_moment_of_save(tmp_path: Path) -> None:
    """Everything may change the moment that `save` returns: tensors, values, hyperparameters, generators."""
    state = {**training_state("adamw", 1), "values": {"n": 1, "t": torch.ones(50_000), "l": [1]}}
    train(state["model"], state["optimizer"])
    with Checkpointer(tmp_path, state) as checkpointer:
        expected = photograph(state)
        handle = checkpointer.save(1)
        state["values"]["n"] = 2
        state["values"]["l"].append(2)
        state["values"]["t"].fill_(9)
        state["optimizer"].param_groups[0]["lr"] = 9.0
        train(state["model"], state["optimizer"], 2)
        handle.result(60)
    other = {**training_state("adamw", 2), "values": {}}
    assert differences(photograph(restored(tmp_path, other)), expected) == []


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def make(tied: bool) -> nn.ModuleDict:
        network = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        if tied:
            network["head"].weight = network["embed"].weight
        return network

    source = make(True)
    id = saved(tmp_path, {"model": source})
    manifest = read_manifest(LocalStorage(tmp_path), id)
    assert "model.embed.weight" in manifest.tensors
    assert "model.head.weight" not in manifest.tensors
    assert manifest.aliases == {"model.head.weight": "model.embed.weight"}
    assert "model.head.weight" not in load_file(tmp_path / id / "shard-00000.safetensors")
    tied, apart = make(True), make(False)
    restored(tmp_path, {"model": tied})
    restored(tmp_path, {"model": apart})
    assert tied["head"].weight is tied["embed"].weight
    assert same_bits(tied["embed"].weight, source["embed"].weight)
    assert same_bits(apart["embed"].weight, source["embed"].weight)
    assert same_bits(apart["head"].weight, source["embed"].weight), "both names get the tied values"


def test_parameters_that_are_not_contiguous(tmp_path: Path) -> None:
    def make() -> nn.Module:
        network = nn.Module()
        network.transposed = nn.Parameter(torch.randn(5, 3).t())
        network.strided = nn.Parameter(torch.randn(4, 10)[:, ::2])
        network.channels_last = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        return network

    source, other = make(), make()
    strides = {name: p.stride() for name, p in other.named_parameters()}
    saved(tmp_path, {"model": source})
    restored(tmp_path, {"model": other})
    for (name, one), two in zip(source.named_parameters(), other.parameters(), strict=True):
        assert same_bits(one, two), name
        assert two.stride() == strides[name]


def test_compiled_and_plain_models_read_each_other(tmp_path: Path) -> None:
    plain, compiled = model(1), model(2)
    optimizer = torch.optim.AdamW(plain.parameters())
    train(plain, optimizer)
    saved(tmp_path / "plain", {"model": plain, "optimizer": optimizer})
    wrapped: Any = torch.compile(compiled, backend="eager")
    state = {"model": wrapped, "optimizer": torch.optim.AdamW(wrapped.parameters())}
    restored(tmp_path / "plain", state)
    assert differences(photograph({"m": compiled}), photograph({"m": plain})) == []
    train(wrapped, state["optimizer"])
    saved(tmp_path / "compiled", state)
    restored(tmp_path / "compiled", {"model": plain, "optimizer": optimizer})
    assert differences(photograph({"m": plain}), photograph({"m": compiled})) == []


def test_buffers_that_are_not_persistent_are_neither_saved_nor_touched(tmp_path: Path) -> None:
    source, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for network, value in ((source, 1.0), (other, 2.0)):
        network.register_buffer("cache", torch.full((2,), value), persistent=False)
        network.register_buffer("kept", torch.full((2,), value))
    saved(tmp_path, {"model": source})
    restored(tmp_path, {"model": other})
    assert other.cache.tolist() == [2, 2]
    assert other.kept.tolist() == [1, 1]


class Stateful(nn.Linear):
    """A module with state of its own beside its tensors."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("model_only", [False, True])
@pytest.mark.parametrize(
    "extra", [{"amax": [1.0, 2.0]}, torch.arange(4.0), {"t": torch.ones(2)}], ids=["json", "tensor", "both"]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_extra_state_of_modules(extra: Any, compiled: bool, model_only: bool, tmp_path: Path) -> None:
    source, other = nn.Sequential(Stateful(2, 2)), nn.Sequential(Stateful(2, 2))
    source[0].extra = extra
    wrapped: Any = torch.compile(other, backend="eager") if compiled else other
    saved(tmp_path, {"model": source})
    with Checkpointer(tmp_path, {"model": wrapped}) as checkpointer:
        checkpointer.restore("latest", model_only=model_only)
    assert differences(other[0].extra, extra) == []


class CountingOptimizer(torch.optim.Optimizer):
    """Keeps nothing but a counter for each parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] / self.state[parameter]["count"])


def test_an_optimizer_that_keeps_only_counters(tmp_path: Path) -> None:
    network = model(1)
    state: State = {"model": network, "optimizer": CountingOptimizer(network.parameters())}
    train(network, state["optimizer"], 3)
    saved(tmp_path, state)
    expected, losses = photograph(state), train(network, state["optimizer"], 2)
    second = model(2)
    other: State = {"model": second, "optimizer": CountingOptimizer(second.parameters())}
    restored(tmp_path, other)
    assert differences(photograph(other), expected) == []
    assert train(second, other["optimizer"], 2) == losses


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    def make(seed: int) -> State:
        first, second = model(seed), model(seed + 1)
        return {
            "generator": first,
            "critic": second,
            "critic_optimizer": torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.5),
            "generator_optimizer": torch.optim.AdamW(first.parameters()),
        }

    state = make(1)
    train(state["generator"], state["generator_optimizer"])
    train(state["critic"], state["critic_optimizer"], 2)
    saved(tmp_path, state)
    assert differences(photograph(restored(tmp_path, make(5))), photograph(state)) == []


def test_an_unsavable_value_is_refused_by_key_path_and_type_and_the_next_save_works(tmp_path: Path) -> None:
    loader: State = {"position": 1, "workers": {"pool": [object()]}}
    with Checkpointer(tmp_path, {"loader": loader}) as checkpointer:
        with pytest.raises(UnsavableValueError, match=r"loader\.workers\.pool\.0: .* a builtins\.object"):
            checkpointer.save(1)
        checkpointer.wait()
        assert checkpointer.failed_saves == 1
        del loader["workers"]
        record = checkpointer.save(2).result(60)
        assert record is not None
        assert [item.id for item in checkpointer.list()] == [record.id]
        assert checkpointer.failed_saves == 0


def test_model_only_leaves_everything_else_alone(tmp_path: Path) -> None:
    state = {**training_state("adamw", 1), "values": {"n": 1}}
    train(state["model"], state["optimizer"])
    saved(tmp_path, state)
    other = {**training_state("adamw", 2), "values": {"n": 2}}
    train(other["model"], other["optimizer"], 2)
    before = photograph(other)
    with Checkpointer(tmp_path, other) as checkpointer:
        torch.manual_seed(3)
        checkpointer.restore("latest", model_only=True)
        assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    assert differences(photograph(other)["model"], photograph(state)["model"]) == []
    assert differences(photograph(other)["optimizer"], before["optimizer"]) == []
    assert other["values"] == {"n": 2}


def test_the_record_tells_what_was_saved(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"values": {}}, config={"lr": 0.1}) as checkpointer:
        one = checkpointer.save(
            250, epoch=2, tokens=10**12, metrics={"val_loss": 3.5}, reasons=("best", "epoch")
        ).result(60)
        two = checkpointer.save(251, metrics={"val_loss": float("nan")}).result(60)
        assert one is not None
        assert two is not None
        assert checkpointer.last_committed == two
    assert (one.step, one.epoch, one.tokens, one.val_loss) == (250, 2, 10**12, 3.5)
    assert one.reasons == ("best", "epoch")
    assert (one.sequence, one.parent, two.sequence, two.parent) == (1, None, 2, one.id)
    assert two.val_loss is None
    manifest = read_manifest(LocalStorage(tmp_path), one.id)
    assert manifest.config == {"lr": 0.1}
    assert manifest.software["torch"] == str(torch.__version__)
    assert one.bytes == sum(f.stat().st_size for f in (tmp_path / one.id).glob("shard-*"))
