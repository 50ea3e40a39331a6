"""Names that torch and Python do not promise and that this engine stands on: a change must show.

Each is used for a reason given where it is used. What fails here fails there too, but says why.
"""

from __future__ import annotations

import concurrent.futures.thread as futures
import importlib
import inspect
import threading
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, WriteItemType

from engine.state import wrappers
from engine.state.state_dicts import read_state_dict


def test_foreach_copy_copies_lists_also_without_blocking() -> None:
    to = [torch.zeros(2), torch.zeros(()), torch.zeros(2, 2)[:, :1]]
    source = [torch.ones(2), torch.tensor(3.0), torch.full((2, 1), 4.0)]
    torch._foreach_copy_(to, source, non_blocking=True)
    assert [t.flatten().tolist() for t in to] == [[1, 1], [3], [4, 4]]


def test_an_objects_finalizers_can_be_found() -> None:
    class Connection:
        pass

    connection = Connection()
    finalizer = weakref.finalize(connection, print)
    assert weakref.finalize._registry[finalizer].weakref() is connection  # type: ignore[attr-defined]
    finalizer.detach()


def test_a_modules_tensors_are_in_plain_dicts_of_its_own() -> None:
    network = nn.BatchNorm1d(2)
    network.register_buffer("cache", torch.ones(1), persistent=False)
    network.register_buffer("absent", None)
    assert isinstance(network._parameters, dict)
    assert isinstance(network._buffers, dict)
    assert isinstance(network._modules, dict)
    assert set(network._parameters) == {"weight", "bias"}
    assert network._parameters["weight"] is network.weight
    assert network._buffers["running_mean"] is network.running_mean
    assert network._buffers["absent"] is None
    assert network._non_persistent_buffers_set == {"cache"}
    network.running_mean = torch.full((2,), 7.0)
    assert network._buffers["running_mean"].tolist() == [7, 7], "assignment goes through the dict"
    network.child = nn.Linear(1, 1)
    assert network._modules["child"] is network.child


def test_a_step_that_runs_hooks_is_marked_also_below_a_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    assert optimizer.step.hooked  # type: ignore[attr-defined]
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert optimizer.step.hooked  # type: ignore[attr-defined]


def test_hooks_on_state_dicts_are_in_dicts_of_the_optimizer() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    optimizer.register_state_dict_pre_hook(lambda *_: None)
    optimizer.register_state_dict_post_hook(lambda *_: None)
    optimizer.register_load_state_dict_pre_hook(lambda *_: None)
    optimizer.register_load_state_dict_post_hook(lambda *_: None)
    for kind in ("state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            assert len(getattr(optimizer, f"_optimizer_{kind}_{when}_hooks")) == 1


def test_loading_an_optimizer_replaces_its_entries() -> None:
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = optimizer.state[network.weight]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[network.weight] is not before


def test_wrappers_are_the_classes_with_the_attributes_that_are_looked_for() -> None:
    """A class that is not found is taken for no wrapper, and its attribute would be part of every name."""
    import lightning.fabric.wrappers  # noqa: F401
    import torch._dynamo.eval_frame
    import torch.distributed.algorithms._checkpoint.checkpoint_wrapper as activations

    found = [(module, name) for module, name, _ in wrappers._WRAPPERS if "lightning_fabric" not in module]
    found += [wrappers._FSDP1, ("accelerate.optimizer", "AcceleratedOptimizer")]
    importlib.import_module("accelerate.optimizer")
    for module, name in found:
        assert wrappers.loaded_class(module, name) is not None, f"{module}.{name}"
    network = nn.Linear(2, 2)
    for wrapped in (
        torch.compile(network, backend="eager"),
        nn.DataParallel(network),
        activations.checkpoint_wrapper(network),
    ):
        assert wrappers.wrapped_by(wrapped) is network
        assert read_state_dict("it", wrapped).live_key_of == {"weight": "weight", "bias": "bias"}


def test_hooks_of_state_dicts_are_where_they_are_looked_for() -> None:
    def hook(*_: Any) -> None: ...

    network = nn.Linear(1, 1)
    network.register_state_dict_post_hook(hook)
    network.register_state_dict_pre_hook(hook)
    network.register_load_state_dict_pre_hook(hook)
    network.register_load_state_dict_post_hook(hook)
    assert hook in network._state_dict_hooks.values()
    assert hook in network._state_dict_pre_hooks.values()
    assert [kept.hook for kept in network._load_state_dict_pre_hooks.values()] == [hook]
    assert hook in network._load_state_dict_post_hooks.values()


def test_an_uninitialised_parameter_becomes_another_class_and_can_go_back() -> None:
    parameter = nn.UninitializedParameter()
    data = parameter.data
    parameter.materialize((2, 3))
    assert type(parameter) is nn.Parameter
    parameter.data = data
    parameter.__class__ = nn.UninitializedParameter
    assert nn.parameter.is_lazy(parameter)
    parameter.materialize((4,))
    assert parameter.shape == (4,)


def test_extra_state_goes_under_a_name_of_its_own() -> None:
    class WithExtra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"n": 1}

        def set_extra_state(self, state: Any) -> None: ...

    network = nn.Sequential(WithExtra(1, 1))
    assert network.state_dict()["0._extra_state"] == {"n": 1}
    assert nn.Module.get_extra_state is nn.Linear.get_extra_state


def test_step_pre_hooks_run_before_the_step_and_can_be_removed() -> None:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    seen: list[float] = []
    hook = optimizer.register_step_pre_hook(lambda owner, args, kwargs: seen.append(parameter.item()))
    optimizer.step()
    hook.remove()
    optimizer.step()
    assert seen == [1.0]
    assert not optimizer._optimizer_step_pre_hooks


def test_a_compiled_step_can_be_told() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert not hasattr(optimizer.step, "_torchdynamo_orig_callable")
    assert hasattr(torch.compile(optimizer.step, backend="eager"), "_torchdynamo_orig_callable")


def test_the_save_planner_says_which_boxes_a_rank_holds() -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    tensors = {"a.b": torch.arange(6.0).view(2, 3), "s": torch.tensor(1), "e": torch.zeros(0, 2)}
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    items = {item.index.fqn: item for item in planner.create_local_plan().items}
    assert set(items) == set(tensors)
    for name, tensor in tensors.items():
        item = items[name]
        assert item.type == WriteItemType.TENSOR
        assert item.tensor_data is not None
        assert item.tensor_data.size == item.tensor_data.chunk.sizes == tensor.shape
        assert tuple(item.tensor_data.chunk.offsets) == (0,) * tensor.ndim
        assert item.tensor_data.properties.dtype == tensor.dtype
        assert planner.lookup_object(item.index).data_ptr() == tensor.data_ptr()


def test_the_load_planner_names_saved_chunks_by_position() -> None:
    chunks = [ChunkStorageMetadata(torch.Size([n, 0]), torch.Size([2, 3])) for n in (0, 2)]
    metadata = Metadata(
        {"t": TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4, 3]), chunks)}
    )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    tensor = torch.zeros(4, 3)
    planner.set_up_planner({"t": tensor}, metadata, is_coordinator=False)
    items = planner.create_local_plan().items
    assert [item.type for item in items] == [LoadItemType.TENSOR] * 2
    assert [item.storage_index.index for item in items] == [0, 1]
    assert [tuple(item.storage_offsets) for item in items] == [(0, 0), (0, 0)]
    assert [tuple(item.lengths) for item in items] == [(2, 3), (2, 3)]
    assert items[0].dest_index.fqn == "t"
    planner.resolve_tensor(items[1]).fill_(1)
    assert tensor.sum(1).tolist() == [0, 0, 3, 3]
    assert MetadataIndex("t", torch.Size([0, 0])) == items[0].dest_index


def test_a_store_waits_for_keys_and_says_when_it_has_given_up() -> None:
    """An absent key and a lost connection must be told apart: only the first is a DistStoreError."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    client.set("a", b"bytes \x00\xff")
    client.wait(["a"], timedelta(seconds=5))
    assert client.get("a") == b"bytes \x00\xff"
    assert client.check(["a"])
    assert not client.check(["b"])
    with pytest.raises(dist.DistStoreError):
        client.wait(["b"], timedelta(milliseconds=10))
    assert issubclass(dist.DistStoreError, dist.DistError)
    assert issubclass(dist.DistError, RuntimeError)
    assert client.delete_key("a")
    assert not client.check(["a"])


def test_a_lost_store_is_no_absent_key() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    del store
    with pytest.raises(dist.DistNetworkError):
        client.wait(["a"], timedelta(seconds=5))
    assert not issubclass(dist.DistNetworkError, dist.DistStoreError)


def test_python_calls_hooks_before_it_takes_thread_pools_away() -> None:
    register = threading._register_atexit  # type: ignore[attr-defined]
    assert "func" in inspect.signature(register).parameters
    assert isinstance(threading._threading_atexits, list)  # type: ignore[attr-defined]
    names = [str(call.func) for call in threading._threading_atexits]  # type: ignore[attr-defined]
    assert str(futures._python_exit) in names


def test_pickled_tensors_of_subclasses_name_the_function_that_import_replaces() -> None:
    """`engine.convert.unpickling` takes its place, for classes that do not exist where a file is read."""

    class Sub(torch.Tensor):
        pass

    function, arguments = torch.ones(2).as_subclass(Sub).__reduce_ex__(2)
    assert f"{function.__module__}.{function.__qualname__}" == "torch._tensor._rebuild_from_type_v2"
    assert (len(arguments), arguments[1]) == (4, Sub)
