"""Plain tensors that hold boxes of larger ones are saved and restored as the global tensor, on any torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from engine import Checkpointer
from engine.errors import StateMismatchError, UnsavableValueError
from engine.state.local_boxes import boxes_of, carries_boxes, detached, global_shape
from tests.support.carrier import carry

WHOLE = torch.arange(24.0).view(6, 4)


def in_two_boxes(values: torch.Tensor, padding: float = -1.0) -> torch.Tensor:
    """Rows 0 to 2 and 2 to 6 of a [6, 4] tensor, in reverse order, with a padding row after each."""
    local = torch.full((8, 4), padding)
    local[0:4], local[5:7] = values[2:6], values[0:2]
    return carry(local, (6, 4), [(2, 0), (0, 0)], [(0, 0), (5, 0)], [(4, 4), (2, 4)])


def by_columns(values: torch.Tensor) -> torch.Tensor:
    return carry(
        values.clone().t().contiguous().t(), (6, 4), [(0, 0), (0, 1)], [(0, 0), (0, 1)], [(6, 1), (6, 3)]
    )


def merged(values: torch.Tensor) -> torch.Tensor:
    """A [2, 3, 4] tensor whose two leading dimensions are rows of a local one."""
    return carry(values.clone(), (2, 3, 4), [(0, 0, 0), (1, 0, 0)], [(0, 0), (3, 0)], [(1, 3, 4), (1, 3, 4)])


def test_boxes_are_views_of_the_local_memory() -> None:
    local = in_two_boxes(WHOLE)
    assert carries_boxes(local)
    assert global_shape(local) == (6, 4)
    for box in boxes_of(local, "t"):
        begin = box.offsets[0]
        assert torch.equal(box.tensor, WHOLE[begin : begin + box.sizes[0]])
        assert box.tensor.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    assert [box.tensor.shape for box in boxes_of(merged(WHOLE), "t")] == [(1, 3, 4), (1, 3, 4)]


def test_an_ordinary_tensor_carries_none() -> None:
    assert not carries_boxes(torch.zeros(2))
    assert global_shape(torch.zeros(2, 3)) == (2, 3)


def test_detaching_keeps_the_boxes() -> None:
    parameter = nn.Parameter(torch.zeros(8, 4))
    parameter.__dict__.update(in_two_boxes(WHOLE).__dict__)
    assert not carries_boxes(parameter.detach()), "torch has begun to keep them: `detached` may go"
    assert global_shape(detached(parameter)) == (6, 4)
    assert not detached(parameter).requires_grad
    state, step = torch.zeros(8, 4), torch.zeros(())
    assert global_shape(detached(state, like=parameter)) == (6, 4)
    assert global_shape(detached(step, like=parameter)) == ()


@pytest.mark.parametrize(
    "fields",
    [
        ((6, 4), [(0, 0)], [(0, 0), (4, 0)], [(4, 4)]),
        ((6, 4), [(0,)], [(0, 0)], [(4, 4)]),
        ((6, 4), [(3, 0)], [(0, 0)], [(4, 4)]),
        ((6, 4), [(0, 0)], [(5, 0)], [(4, 4)]),
        ((6, 4), [(0, 0)], [(0, 0)], [(4,)]),
        ((4,), [(0,)], [(0, 0)], [(4,)]),
        ((2, 3, 4), [(0, 0, 0)], [(0, 1)], [(1, 3, 4)]),
        ((2, 3, 3), [(0, 0, 0)], [(0, 0)], [(1, 3, 3)]),
    ],
)
def test_contradictions_are_refused_by_name(fields: Any) -> None:
    with pytest.raises(UnsavableValueError, match=r"^values\.t: "):
        boxes_of(carry(torch.zeros(8, 4), *fields), "values.t")


def save(directory: Path, state: dict[str, Any]) -> Path:
    with Checkpointer(directory, state) as checkpointer:
        record = checkpointer.save(1).result(60)
    assert record is not None
    return Path(record.path)


def restore(directory: Path, state: dict[str, Any]) -> None:
    with Checkpointer(directory, state, read_only=True) as checkpointer:
        assert checkpointer.restore("latest") is not None


@pytest.mark.parametrize("make", [in_two_boxes, by_columns], ids=["rows", "columns"])
def test_a_value_is_saved_as_its_global_tensor(make: Any, tmp_path: Path) -> None:
    path = save(tmp_path, {"values": {"t": make(WHOLE)}})
    names = sorted(file.name for file in path.glob("*.safetensors"))
    assert names == ["shard-00000-1.safetensors", "shard-00000.safetensors"], "a file for each box of a name"
    whole = {"t": torch.zeros(6, 4)}
    restore(tmp_path, {"values": whole})
    assert torch.equal(whole["t"], WHOLE)


@pytest.mark.parametrize("make", [torch.clone, by_columns, in_two_boxes], ids=["plain", "columns", "boxes"])
def test_boxes_are_filled_from_any_other_layout_and_padding_is_left_alone(make: Any, tmp_path: Path) -> None:
    save(tmp_path, {"values": {"t": make(WHOLE)}})
    for blank in (in_two_boxes, by_columns):
        local = blank(torch.zeros(6, 4))
        values = {"t": local}
        restore(tmp_path, {"values": values})
        assert torch.equal(local, blank(WHOLE)), "in place, padding included"
        assert carries_boxes(values["t"])


def test_merged_leading_dimensions(tmp_path: Path) -> None:
    save(tmp_path, {"values": merged(WHOLE)})
    whole, local = torch.zeros(2, 3, 4), merged(torch.zeros(6, 4))
    restore(tmp_path, {"values": whole})
    restore(tmp_path, {"values": local})
    assert torch.equal(whole, WHOLE.view(2, 3, 4))
    assert torch.equal(local, WHOLE)


def test_another_global_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"values": in_two_boxes(WHOLE)})
    with pytest.raises(StateMismatchError, match=r"saved as F32 \[6, 4\], here F32 \[8, 4\]"):
        restore(tmp_path, {"values": torch.zeros(8, 4)})


def test_stock_dcp_reads_the_global_tensor(tmp_path: Path) -> None:
    path = save(tmp_path, {"values": {"t": in_two_boxes(WHOLE)}})
    found = {"values.t": torch.zeros(6, 4)}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(path)))
    assert torch.equal(found["values.t"], WHOLE)


class Net(nn.Module):
    """One weight, whole or in boxes."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.weight.__dict__.update(weight.__dict__)


def trained(weight: torch.Tensor, steps: int) -> dict[str, Any]:
    net = Net(weight)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(steps):
        net.weight.grad = net.weight.detach().clone()
        optimizer.step()
    return {"model": net, "optimizer": optimizer}


def test_parameters_and_their_optimizer_state(tmp_path: Path) -> None:
    """A module's state dict and an optimizer's state know nothing of boxes; the parameter does."""
    state = trained(in_two_boxes(WHOLE, padding=0.0), steps=2)
    save(tmp_path, state)
    expected = trained(WHOLE, steps=2)
    whole = trained(torch.zeros(6, 4), steps=0)
    restore(tmp_path, whole)
    assert torch.equal(whole["model"].weight, expected["model"].weight)
    for name in ("exp_avg", "exp_avg_sq"):
        one, two = ({**s["optimizer"].state[s["model"].weight]}[name] for s in (whole, expected))
        assert torch.equal(one, two)
    again = trained(in_two_boxes(torch.zeros(6, 4), padding=0.0), steps=0)
    restore(tmp_path, again)
    assert torch.equal(again["model"].weight, state["model"].weight)


def test_boxes_that_move_in_place_are_noticed(tmp_path: Path) -> None:
    state = trained(in_two_boxes(WHOLE), steps=1)
    weight = state["model"].weight
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1).result(60)
        weight.global_offsets = [(0, 0), (4, 0)]
        record = checkpointer.save(2).result(60)
    assert record is not None
    files = [load_file(file)["model.weight"] for file in sorted(Path(record.path).glob("*.safetensors"))]
    assert {tuple(map(tuple, part.tolist())) for part in files} == {
        tuple(map(tuple, weight[0:4].tolist())),
        tuple(map(tuple, weight[5:7].tolist())),
    }
    whole = trained(torch.zeros(6, 4), steps=0)
    restore(tmp_path, whole)
    assert torch.equal(whole["model"].weight[0:4], weight[0:4])
    assert torch.equal(whole["model"].weight[4:6], weight[5:7])


def test_the_attributes_are_those_of_torch() -> None:
    """Where torch has the protocol, its own check says yes to what ours does."""
    protocol: Any = pytest.importorskip("torch.distributed.checkpoint.protocol")
    assert isinstance(in_two_boxes(WHOLE), protocol.CheckpointableTensor)
    fields: Sequence[str] = list(protocol.CheckpointableTensor.__annotations__)
    assert sorted(fields) == ["global_offsets", "global_shape", "local_offsets", "local_sizes"]
