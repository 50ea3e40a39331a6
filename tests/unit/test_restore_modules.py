"""Modules come back bit for bit, whatever their state_dict() makes of them and whatever wraps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from engine import Checkpointer
from engine.errors import RestoreFailedError, StateMismatchError
from engine.state.state_dicts import live_tensors
from engine.state.wrappers import named_modules

Build = Callable[[], Any]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer as it is, whatever state_dict() says."""
    return {name: t.detach().clone() for name, t in live_tensors(named_modules(model)).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def scrambled(model: Any) -> Any:
    with torch.no_grad():
        for tensor in live_tensors(named_modules(model)).values():
            tensor.copy_(torch.randn_like(tensor) if tensor.is_floating_point() else tensor + 3)
    return model


def save(folder: Path, model: nn.Module, *more: nn.Module) -> None:
    """Two saves, the second after a change: it is what comes back."""
    with Checkpointer(folder, {"model": model}) as checkpointer:
        checkpointer.save(1).result(60)
        scrambled(model)
        checkpointer.save(2).result(60)


def restore(folder: Path, model: nn.Module, **how: Any) -> None:
    with Checkpointer(folder, {"model": model}, read_only=True) as checkpointer:
        checkpointer.restore(**how)


class Block(nn.Module):
    """Three projections in one parameter, and what a hook or an override makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 9)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("scale", torch.ones(2))


class Clones(Block):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}


class Halves(Block):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: tensor.half() for name, tensor in super().state_dict(*args, **kwargs).items()}


class Drops(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._drop)

    @staticmethod
    def _drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        del state[f"{prefix}frozen.weight"]


class Splits(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._join)

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        parts = state.pop(f"{prefix}qkv.weight").clone().chunk(3)
        state.update({f"{prefix}{name}": part for name, part in zip("qkv", parts, strict=True)})

    @staticmethod
    def _join(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}qkv.weight"] = torch.cat([state.pop(f"{prefix}{name}") for name in "qkv"])


class Transposes(Block):
    """Hands out the weight as another program wants it, rounded besides."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._turn)
        self.register_load_state_dict_pre_hook(self._turn)

    @staticmethod
    def _turn(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if state[f"{prefix}qkv.weight"].dtype is torch.float32:
            state[f"{prefix}qkv.weight"] = state[f"{prefix}qkv.weight"].t().bfloat16()
        else:
            state[f"{prefix}qkv.weight"] = state[f"{prefix}qkv.weight"].t().float()


class Exports(Block):
    """Adds keys that another program reads; nothing takes them when this one loads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._add)
        self.note = 0

    @staticmethod
    def _add(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        parts = state.pop(f"{prefix}qkv.weight").clone().chunk(3)
        state.update({f"{prefix}{name}": part for name, part in zip("qkv", parts, strict=True)})
        state[f"{prefix}note"] = module.note


class Renames(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(self._out)
        self.register_load_state_dict_pre_hook(self._in)

    @staticmethod
    def _out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}kernel"] = state.pop(f"{prefix}qkv.weight")

    @staticmethod
    def _in(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}qkv.weight"] = state.pop(f"{prefix}kernel")


@pytest.mark.parametrize(
    "kind", [Clones, Halves, Drops, Splits, Transposes, Exports, Renames], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "child"])
def test_a_module_with_hooks_or_overrides_comes_back_bit_for_bit(
    tmp_path: Path, kind: type[nn.Module], inside: bool
) -> None:
    def build() -> Any:
        return nn.Sequential(nn.Linear(2, 2), kind()) if inside else kind()

    model, fresh = build(), build()
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))
    with torch.no_grad():
        next(fresh.parameters()).add_(1)
    assert not same(bits(fresh), bits(model)), "the live weights, not copies, were compared"


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, checkpoint_wrapper, lambda m: checkpoint_wrapper(compile_eagerly(m))]
)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "child"])
def test_keys_that_nothing_takes_are_known_below_wrappers(tmp_path: Path, wrap: Any, inside: bool) -> None:
    model, fresh = (nn.Sequential(wrap(Exports())) if inside else wrap(Exports()) for _ in range(2))
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))


def test_a_value_that_a_hook_adds_and_nothing_takes_is_told_if_it_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, fresh = Exports(), Exports()
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert not caplog.messages, "what is made from the weights is equal"
    fresh.note = 5
    restore(tmp_path, fresh)
    (told,) = caplog.messages
    assert told.startswith("model.note is 5, saved as 0: not restored, because load_state_dict() of")
    other = nn.Sequential(Exports())
    other[0].register_load_state_dict_pre_hook(
        lambda _, state, prefix, *__: state.update({prefix + "typo": 1})
    )
    save(tmp_path / "other", other)
    with pytest.raises(RestoreFailedError, match=r"unexpected keys: 0\.typo"):
        restore(tmp_path / "other", other)


def plain() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))


def compiled() -> Any:
    return torch.compile(plain(), backend="eager")


def data_parallel() -> Any:
    return nn.DataParallel(plain())


def wrapped_inside() -> Any:
    model = plain()
    model[0] = torch.compile(checkpoint_wrapper(model[0]), backend="eager")
    model[1] = checkpoint_wrapper(torch.compile(model[1], backend="eager"))
    return checkpoint_wrapper(model)


def fabric() -> Any:
    return pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1).setup(plain())


def accelerated() -> Any:
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(plain())


WRAPPED = [plain, compiled, data_parallel, wrapped_inside, fabric, accelerated]


@pytest.mark.parametrize("live", WRAPPED, ids=lambda f: f.__name__)
def test_saved_without_wrappers_and_restored_with_them(tmp_path: Path, live: Build) -> None:
    model, fresh = plain(), live()
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))


@pytest.mark.parametrize("saved", WRAPPED, ids=lambda f: f.__name__)
def test_saved_with_wrappers_and_restored_without_them(tmp_path: Path, saved: Build) -> None:
    model, fresh = saved(), plain()
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_comes_back_with_its_count(tmp_path: Path, use_buffers: bool) -> None:
    average = AveragedModel(compiled(), use_buffers=use_buffers)
    with Checkpointer(tmp_path, {"average": average}) as checkpointer:
        for _ in range(3):
            average.update_parameters(scrambled(compiled()))
        checkpointer.save(1).result(60)
    fresh = AveragedModel(plain(), use_buffers=use_buffers)
    with Checkpointer(tmp_path, {"average": fresh}, read_only=True) as checkpointer:
        checkpointer.restore()
    assert int(fresh.n_averaged) == 3
    assert same(bits(fresh), bits(average))


class Counts(nn.Module):
    """Keeps a number that is no tensor in its state_dict()."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.count = 0
        self.best: torch.Tensor | None = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}count"] = self.count
        if self.best is not None:
            destination[f"{prefix}best"] = self.best

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.count = state.pop(f"{prefix}count")
        self.best = state.pop(f"{prefix}best", None)
        super()._load_from_state_dict(state, prefix, *args)


@pytest.mark.parametrize("wrap", [lambda m: m, checkpoint_wrapper, nn.DataParallel], ids=["bare", "ac", "dp"])
def test_values_that_an_override_adds_come_back_wrapped_or_not(tmp_path: Path, wrap: Any) -> None:
    model = nn.Sequential(wrap(Counts()))
    counts = next(m for m in model.modules() if isinstance(m, Counts))
    counts.count, counts.best = 4, torch.tensor([1.0, 2.0])
    save(tmp_path, wrap(model))
    for fresh in (nn.Sequential(Counts()), nn.Sequential(wrap(Counts()))):
        restore(tmp_path, fresh)
        (live,) = (m for m in fresh.modules() if isinstance(m, Counts))
        assert live.count == 4
        assert live.best is not None
        assert live.best.tolist() == [1, 2]
        assert same(bits(fresh), bits(model))


def test_values_that_the_live_module_does_not_take_are_refused_before_anything_changes(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(Counts())
    save(tmp_path, model)
    plain_one = nn.Sequential(nn.Module())
    plain_one[0].weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(StateMismatchError, match=r"model\.0\.count \(a value from state_dict\(\)"):
        restore(tmp_path, plain_one)
    assert plain_one[0].weight.tolist() == [0, 0]
    restore(tmp_path, plain_one, strict=False)
    assert same(bits(plain_one), bits(model))


def test_values_that_the_checkpoint_lacks_are_refused_before_anything_changes(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Module())
    other[0].weight = nn.Parameter(torch.ones(2))
    save(tmp_path, other)
    model = nn.Sequential(Counts())
    with pytest.raises(StateMismatchError, match=r"model\.0\.count \(a value from state_dict\(\)"):
        restore(tmp_path, model)
    assert model[0].weight.tolist() == [1, 1]
    model[0].count = 9
    restore(tmp_path, model, exclude=["model.0.count"])
    assert same(bits(model), bits(other))
    assert model[0].count == 9


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.rounds = 0

    def state_dict(self, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"net": self.net.state_dict(), "more": {"rounds": self.rounds}}

    def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
        self.net.load_state_dict(state["net"])
        self.rounds = state["more"]["rounds"]


def test_nested_values_come_back(tmp_path: Path) -> None:
    model, fresh = Nested(), Nested()
    model.rounds = 7
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))
    assert fresh.rounds == 7


def compile_eagerly(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, checkpoint_wrapper, compile_eagerly])
def test_overrides_that_a_wrapper_would_not_call_are_called(tmp_path: Path, wrap: Any) -> None:
    class NoArguments(Nested):
        def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
            return super().state_dict()

    model, fresh = NoArguments(), NoArguments()
    model.rounds = 7
    save(tmp_path, wrap(model))
    restore(tmp_path, wrap(fresh))
    assert same(bits(fresh), bits(model))
    assert fresh.rounds == 7


def test_a_hook_on_the_wrapper_itself_takes_part(tmp_path: Path) -> None:
    seen = []

    def wrapped() -> Any:
        model = nn.DataParallel(plain())
        model.register_state_dict_post_hook(lambda _, state, __, ___: state.update(note=torch.tensor(5)))
        model.register_load_state_dict_pre_hook(lambda _, state, *__: seen.append(int(state.pop("note"))))
        return model

    model, fresh = wrapped(), wrapped()
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))
    assert seen == [5]


class Stacked(nn.Module):
    """Experts that are handed out as one tensor: no key is left for the parameters themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def state_dict(self, *_: Any, destination: Any = None, prefix: str = "", **__: Any) -> Any:
        found = {} if destination is None else destination
        found[f"{prefix}stacked"] = torch.stack([expert.weight for expert in self.experts])
        return found

    def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
        for expert, weight in zip(self.experts, state.pop(f"{prefix}stacked"), strict=True):
            expert.weight.data.copy_(weight)


def test_tensors_that_are_handed_out_as_one(tmp_path: Path) -> None:
    model, fresh = nn.Sequential(plain(), Stacked()), nn.Sequential(plain(), Stacked())
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))


class Grows(nn.Module):
    """Makes the layers that the loaded state has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:  # type: ignore[override]
        while len(self.layers) <= max(int(name.split(".")[1]) for name in state):
            self.layers.append(nn.Linear(2, 2))
        return super().load_state_dict(state, strict)


def test_layers_that_loading_makes_come_back(tmp_path: Path) -> None:
    model, fresh = Grows(), Grows()
    model.layers.append(nn.Linear(2, 2))
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))


def test_a_module_that_refuses_its_state_is_named(tmp_path: Path) -> None:
    class Refuses(Nested):
        def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
            raise ValueError("not today")

    save(tmp_path, Nested())
    with pytest.raises(RestoreFailedError, match=r"model: load_state_dict\(\) of .*Refuses.*not today"):
        restore(tmp_path, Refuses())


@pytest.mark.parametrize("persistent", [False, True])
def test_metrics_come_back_in_the_middle_of_an_epoch(tmp_path: Path, persistent: bool) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Last(torchmetrics.Metric):  # type: ignore[misc,name-defined]
        """Its forward() weighs what it has by the number of updates."""

        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("value", torch.tensor(0.0), dist_reduce_fx="mean")

        def update(self, values: torch.Tensor) -> None:
            self.value = values.mean()

        def compute(self) -> Any:
            return self.value

    def build() -> Any:
        metrics = torchmetrics.MetricCollection(
            [
                torchmetrics.CatMetric(),
                torchmetrics.MeanMetric(),
                # These two have the same state, and only the first of them is updated.
                torchmetrics.classification.BinaryPrecision(),
                torchmetrics.classification.BinaryRecall(),
                torchmetrics.classification.BinaryROC(thresholds=5),
            ]
        )
        metrics.persistent(persistent)
        return {"all": metrics, "one": torchmetrics.PearsonCorrCoef(), "mean": Last()}

    def update(state: Any, seed: int) -> None:
        torch.manual_seed(seed)
        for name, metric in state["all"].items(keep_base=True):
            targets = (torch.randint(0, 2, (8,)),) if "Binary" in name else ()
            metric.update(torch.rand(8), *targets)
        state["one"](torch.rand(8), torch.rand(8))
        state["mean"](torch.rand(8))

    def computed(state: Any) -> list[Any]:
        found = [*state["all"].compute().values(), state["one"].compute(), state["mean"].compute()]
        return [[t.tolist() for t in v] if isinstance(v, tuple) else v.tolist() for v in found]

    metrics, fresh = build(), build()
    with Checkpointer(tmp_path, metrics) as checkpointer:
        checkpointer.save(1).result(60)
        update(metrics, 1)
        update(metrics, 2)
        checkpointer.save(2).result(60)
    update(fresh, 9)
    computed(fresh)
    with Checkpointer(tmp_path, fresh, read_only=True) as checkpointer:
        checkpointer.restore()
    assert computed(fresh) == computed(metrics)
    for one in (metrics, fresh):
        update(one, 3)
    assert computed(fresh) == computed(metrics)


@pytest.mark.parametrize("build", [nn.MSELoss, nn.ModuleList, lambda: nn.BatchNorm1d(2, False)])
def test_a_module_without_tensors_is_saved_and_restored(tmp_path: Path, build: Build) -> None:
    with Checkpointer(tmp_path, {"loss": build(), "n": [1]}) as checkpointer:
        checkpointer.save(1).result(60)
    values = [0]
    with Checkpointer(tmp_path, {"loss": build(), "n": values}, read_only=True) as checkpointer:
        checkpointer.restore()
    assert values == [1]


def lazy() -> Any:
    return nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(1))


def test_lazy_modules_get_their_shapes_from_the_checkpoint(tmp_path: Path) -> None:
    model, fresh = lazy(), lazy()
    model(torch.randn(4, 5))
    save(tmp_path, model)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))
    assert optimizer.param_groups[0]["params"][0] is fresh[0].weight
    inputs = torch.randn(4, 5)
    assert torch.equal(fresh(inputs), model(inputs))


def test_a_refused_restore_leaves_lazy_modules_lazy(tmp_path: Path) -> None:
    model = lazy()
    model(torch.randn(4, 5))
    save(tmp_path, model)
    fresh = nn.Sequential(*lazy(), nn.Linear(1, 1))
    with pytest.raises(StateMismatchError, match=r"model\.3\.weight"):
        restore(tmp_path, fresh)
    assert nn.parameter.is_lazy(fresh[0].weight)
    assert nn.parameter.is_lazy(fresh[1].running_mean)
    fresh(torch.randn(4, 2))


def test_a_buffer_that_was_made_in_training_comes_back(tmp_path: Path) -> None:
    def build() -> Any:
        model = nn.Linear(2, 2)
        model.register_buffer("history", None)
        return model

    model, fresh = build(), build()
    model.history = torch.arange(4.0)
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))


def test_a_buffer_that_was_taken_away_in_training_goes(tmp_path: Path) -> None:
    def build() -> Any:
        model = nn.Linear(2, 2)
        model.register_buffer("warmup", torch.ones(3))
        return model

    model, fresh = build(), build()
    with Checkpointer(tmp_path, {"model": model}) as checkpointer:
        checkpointer.save(1).result(60)
        model.warmup = None
        checkpointer.save(2).result(60)
    restore(tmp_path, fresh)
    assert fresh.warmup is None
    assert same(bits(fresh), bits(model))


@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel], ids=["bare", "wrapped"])
def test_a_buffer_that_was_registered_in_training_comes_back(tmp_path: Path, wrap: Any) -> None:
    model = wrap(plain())
    with Checkpointer(tmp_path, {"model": model}) as checkpointer:
        checkpointer.save(1).result(60)
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
        norm.register_buffer("seen", torch.ones(3))
        next(m for m in model.modules() if isinstance(m, nn.Sequential)).register_buffer("top", torch.ones(2))
        checkpointer.save(2).result(60)
    fresh, other = plain(), nn.Sequential(*plain(), nn.Linear(2, 2))
    with pytest.raises(StateMismatchError, match=r"model\.2\.weight"):
        restore(tmp_path, other)
    assert not hasattr(other[1][0], "seen")
    assert not hasattr(other, "top")
    with Checkpointer(tmp_path, {"model": fresh}) as checkpointer:
        checkpointer.restore()
        checkpointer.save(3).result(60)
    assert same(bits(fresh), bits(model))
    third = wrap(plain())
    restore(tmp_path, third)
    assert same(bits(third), bits(model))


class Queue(nn.Module):
    """A buffer whose length changes; loading takes the saved length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("items", torch.zeros(0))

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.items = torch.empty_like(state[f"{prefix}items"])
        super()._load_from_state_dict(state, prefix, *args)


def test_a_buffer_whose_module_takes_other_shapes_comes_back(tmp_path: Path) -> None:
    model, fresh = nn.Sequential(Queue()), nn.Sequential(Queue())
    model[0].items = torch.arange(5.0)
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))


def test_hooks_that_run_after_loading_see_the_restored_weights(tmp_path: Path) -> None:
    class Cached(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_load_state_dict_post_hook(self._note)

        def _note(self, module: nn.Module, _: Any) -> None:
            self.norm = float(self.weight.detach().norm())

    model, fresh = Cached(), Cached()
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert fresh.norm == float(model.weight.detach().norm())


MODULES: list[Build] = [
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(2)), "b": nn.ParameterList([torch.ones(1)])}),
    lambda: nn.MultiheadAttention(4, 2),
    lambda: nn.InstanceNorm1d(3, affine=True),
    lambda: nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)), nn.Linear(3, 1)),
]


@pytest.mark.parametrize("build", MODULES, ids=range(len(MODULES)))
def test_torchs_own_modules_come_back(tmp_path: Path, build: Build) -> None:
    model, fresh = build(), build()
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert same(bits(fresh), bits(model))


def test_buffers_that_are_not_persistent_keep_their_live_value(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    for one, value in ((model, 1.0), (fresh, 2.0)):
        one.register_buffer("cache", torch.full((2,), value), persistent=False)
    save(tmp_path, model)
    restore(tmp_path, fresh)
    assert fresh.get_buffer("cache").tolist() == [2, 2]
