"""Hooks and overrides of state_dict(): what they hand out never stands for the live tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from engine.errors import UnsavableValueError
from engine.state.capture import StateCapture
from engine.state.state_dicts import has_own_loading, has_own_state_dict

Hook = Callable[[nn.Module, dict[str, Any], str, Any], Any]


def hooked(hook: Hook) -> nn.Sequential:
    """A model in which one of three layers has a hook."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].register_state_dict_post_hook(hook)
    return model


def found(model: nn.Module) -> dict[str, torch.Tensor]:
    captured = StateCapture({"model": model}, (), 0).capture()
    return {n.removeprefix("model."): t for n, t in captured.tensors.items() if n.startswith("model.")}


def values_of(model: nn.Module) -> Any:
    return StateCapture({"model": model}, (), 0).capture().shared.get("model")


def clone(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in ("weight", "bias"):
        state[prefix + name] = state[prefix + name].clone()


def half(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].half()


def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    del state[prefix + "weight"]


def rename(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + "kernel"] = state.pop(prefix + "weight")


def split(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, part in zip("qkv", state.pop(prefix + "weight").chunk(3), strict=True):
        state[prefix + name] = part.clone()


def add(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + "version"] = 3
    state[prefix + "scale"] = torch.full((2,), 5.0)


def transpose(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + "weight"] = state[prefix + "weight"].t()


@pytest.mark.parametrize("hook", [clone, half, drop, rename, split, add, transpose], ids=lambda h: h.__name__)
def test_the_live_tensors_are_captured_whatever_a_hook_makes_of_them(hook: Hook) -> None:
    model = hooked(hook)
    live = {t.data_ptr() for t in model.parameters()}
    assert live <= {t.data_ptr() for t in found(model).values()}
    capture = StateCapture({"model": model}, (), 0)
    first = capture.capture()
    with torch.no_grad():
        model[1].weight.fill_(7.0)
    second = capture.capture()
    assert second.generation == first.generation, "the live tensors are the same ones"
    kept = [t for t in second.tensors.values() if t.data_ptr() == model[1].weight.data_ptr()]
    assert kept[0].dtype == torch.float32
    assert bool((kept[0] == 7).all())


@pytest.mark.parametrize(
    ("hook", "extra"),
    [
        (clone, set()),
        (half, set()),
        (drop, set()),
        (split, {"1.q", "1.k", "1.v"}),
        (add, {"1.scale"}),
        (transpose, {"$state_dict.1.weight"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_only_what_live_tensors_do_not_account_for_is_kept_beside_them(hook: Hook, extra: set[str]) -> None:
    assert set(found(hooked(hook))) - set(hooked(lambda *_: None).state_dict()) == extra


def test_a_key_that_was_renamed_is_the_tensors_name() -> None:
    names = set(found(hooked(rename)))
    assert "1.kernel" in names
    assert "1.weight" not in names


def test_values_that_a_hook_adds_are_read_anew_each_time() -> None:
    count = [0]

    def counting(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        count[0] += 1
        state[prefix + "count"] = count[0]
        if count[0] > 2:
            state[prefix + "late"] = torch.tensor(count[0])

    capture = StateCapture({"model": hooked(counting)}, (), 0)
    assert capture.capture().shared["model"] == {"1.count": 1}
    assert capture.capture().shared["model"] == {"1.count": 2}
    last = capture.capture()
    assert last.shared["model"]["1.count"] == 3
    assert last.tensors["model.1.late"] == 3


def test_a_hook_that_comes_later_is_noticed() -> None:
    model = nn.Linear(2, 2)
    capture = StateCapture({"model": model}, (), 0)
    assert "model" not in capture.capture().shared
    model.register_state_dict_post_hook(add)
    assert capture.capture().shared["model"]["version"] == 3


def test_a_pre_hook_may_put_a_value_into_a_buffer() -> None:
    model = nn.BatchNorm1d(2)

    def note(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        module.num_batches_tracked = torch.tensor(int(module.num_batches_tracked) + 1)

    model.register_state_dict_pre_hook(note)
    capture = StateCapture({"model": model}, (), 0)
    for expected in (1, 2, 3):
        assert capture.capture().tensors["model.num_batches_tracked"] >= expected


def test_a_copy_of_one_element_with_a_stride_is_told_from_another_value() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("one", torch.arange(4.0)[::2][1:2])
    model.register_state_dict_post_hook(lambda _, state, *__: state.update(one=state["one"].double()))
    assert set(found(model)) == {"weight", "bias", "one"}


class Nested(nn.Module):
    """state_dict() returns other things than tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.rounds = 3

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        net = dict(self.net.state_dict())
        return {"net": net, "rounds": self.rounds, "log": [{"best": torch.ones(1)}, None]}


def test_nested_values_refer_to_live_tensors_by_their_name() -> None:
    model = Nested()
    assert set(found(model)) == {"net.weight", "net.bias", "log.0.best"}
    assert found(model)["net.weight"].data_ptr() == model.net.weight.data_ptr()
    assert values_of(model) == {
        "net": {
            "$items": [["weight", {"$tensor": "model.net.weight"}], ["bias", {"$tensor": "model.net.bias"}]]
        },
        "rounds": 3,
        "log": [{"best": {"$tensor": "model.log.0.best"}}, None],
    }


def test_a_metric_inside_of_a_model_keeps_what_it_says_is_persistent() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metrics = nn.ModuleList([torchmetrics.MeanMetric(), torchmetrics.CatMetric()])
    assert found(metrics) == {}
    for metric in metrics:
        metric.persistent(True)
    capture = StateCapture({"model": metrics}, (), 0)
    capture.capture()
    for metric in metrics:
        metric.update(torch.tensor([2.0, 4.0]))
    tensors = capture.capture().tensors
    assert tensors["model.0.mean_value"] == 6
    assert tensors["model.1.value.0"].tolist() == [2, 4]


def test_a_state_dict_that_is_none_is_refused_by_name() -> None:
    class Odd(nn.Linear):
        def state_dict(self) -> Any:  # type: ignore[override]
            return [self.weight]

    with pytest.raises(UnsavableValueError, match=r"model: state_dict\(\) of .*Odd returns a list"):
        found(Odd(1, 1))


def test_names_that_two_tensors_claim_are_refused() -> None:
    def take(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "bias")

    with pytest.raises(UnsavableValueError, match=r"model\.1\.weight: state_dict\(\) returns another tensor"):
        found(hooked(take))


def test_meta_tensors_do_not_vanish() -> None:
    """DCP's get_model_state_dict leaves them out without a word."""
    with pytest.raises(UnsavableValueError, match=r"model\.weight: a meta tensor"):
        found(nn.Linear(2, 2, device="meta"))


class Loading(nn.Linear):
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)


class Saving(nn.Linear):
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._save_to_state_dict(*args, **kwargs)


def test_torchs_own_modules_are_not_asked_again() -> None:
    for model in (
        nn.MultiheadAttention(4, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        nn.utils.spectral_norm(nn.Linear(2, 2)),
        nn.BatchNorm1d(2),
    ):
        assert not has_own_state_dict(model)
        assert not has_own_loading(model)


def test_code_that_is_not_torchs_is_told() -> None:
    assert has_own_state_dict(nn.Sequential(Saving(1, 1)))
    assert not has_own_state_dict(Loading(1, 1))
    assert has_own_loading(Loading(1, 1))
    for hook in (lambda *_: None, functools.partial(print, end="")):
        model = nn.Linear(1, 1)
        model.register_load_state_dict_pre_hook(hook)
        assert has_own_loading(model)


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, 2).to_sparse_csr(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        torch.ones(2, device="meta"),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "csr", "nested", "jagged", "meta", "quantized"],
)
def test_buffers_of_odd_kinds_are_refused_by_name(odd: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("odd", odd)
    with pytest.raises(UnsavableValueError, match=r"model\.0\.odd: "):
        found(model)


def test_memory_that_is_read_conjugated_or_negated_is_not_the_same() -> None:
    """A view of it has the same address, dtype, shape and strides."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("wave", torch.tensor([1 + 2j]))

        def state_dict(self, **_: Any) -> dict[str, Any]:  # type: ignore[override]
            return {"conjugate": self.wave.conj(), "wave": self.wave}

    class Turned(Views):
        def state_dict(self, **_: Any) -> dict[str, Any]:  # type: ignore[override]
            return {"wave": self.wave.conj()}

    assert set(found(Views())) == {"wave", "conjugate"}
    assert set(found(Turned())) == {"wave", "$state_dict.wave"}
