"""`diff`: what is added, removed and changed, by how much, and what digests alone prove equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import Checkpointer
from engine.convert.checkpoint import CheckpointTensors
from engine.convert.compare import Difference, diff_checkpoints
from engine.errors import DamagedError
from engine.storage.local import LocalStorage
from tests.support.tiny_checkpoint import write_checkpoint

NAN, INF = float("nan"), float("inf")


def save(directory: Path, state: dict[str, torch.Tensor]) -> str:
    """A checkpoint whose tensors are "t.<name>"."""
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    with Checkpointer(directory, {"t": module}, retention=None) as checkpointer:
        record = checkpointer.save(1).result()
    assert record is not None
    return record.id


@pytest.fixture
def diff(tmp_path: Path) -> Callable[..., Difference]:
    def diff(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> Difference:
        storage = LocalStorage(tmp_path)
        before, after = (storage, save(tmp_path, one)), (storage, save(tmp_path, two))
        return diff_checkpoints(before, after)

    return diff


def test_added_removed_changed_and_equal(diff: Callable[..., Difference]) -> None:
    one = {"gone": torch.ones(2), "same": torch.ones(3), "moved": torch.zeros(4)}
    moved = torch.tensor([0.0, -0.5, 0.25, 0.0])
    found = diff(one, {"new": torch.ones(2), "same": torch.ones(3), "moved": moved})
    assert (found.added, found.removed) == (("t.new",), ("t.gone",))
    (changed,) = found.changed
    assert (changed.name, changed.largest, changed.elements) == ("t.moved", 0.5, 2)
    equal = [item.name for item in found.common if item.equal]
    assert [name for name in equal if not name.startswith("per_rank.")] == ["t.same"]
    assert not found.same


def test_a_shape_or_dtype_that_changed(diff: Callable[..., Difference]) -> None:
    one = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    found = diff(one, {"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.float64)})
    assert [(item.name, item.largest) for item in found.changed] == [("t.a", None), ("t.b", None)]
    assert [item.after.dtype for item in found.changed] == ["F32", "F64"]


@pytest.mark.parametrize(
    ("one", "two", "equal", "largest"),
    [
        ([NAN, 1.0], [NAN, 1.0], True, 0.0),
        ([NAN, 1.0], [NAN, 3.0], False, 2.0),
        ([1.0, NAN], [1.0, 1.0], False, None),
        ([INF, 1.0], [INF, 1.5], False, 0.5),
        ([INF, 1.0], [-INF, 1.0], False, INF),
        ([0.0, 1.0], [-0.0, 1.0], False, 0.0),
    ],
)
def test_numbers_that_are_none(
    diff: Callable[..., Difference], one: list[float], two: list[float], equal: bool, largest: float | None
) -> None:
    # The second tensor makes the files' blocks differ, so that the first has to be read.
    found = diff({"a": torch.tensor(one), "b": torch.zeros(1)}, {"a": torch.tensor(two), "b": torch.ones(1)})
    first = next(item for item in found.common if item.name == "t.a")
    assert (first.equal, first.compared) == (equal, "bytes")
    assert first.largest == largest
    assert largest is None or not math.isnan(largest)


def test_integers_and_booleans(diff: Callable[..., Difference]) -> None:
    one = {"i": torch.tensor([2**40, -3]), "f": torch.tensor([True, False])}
    found = diff(one, {"i": torch.tensor([2**40 + 1, 4]), "f": torch.tensor([True, True])})
    assert {item.name: item.largest for item in found.changed} == {"t.i": 7.0, "t.f": 1.0}


def test_digests_alone_prove_equality_and_nothing_is_read(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one, two = (write_checkpoint(tmp_path, sequence=n, seed=5, world_size=2) for n in (1, 2))
    totals: list[int] = []
    found = diff_checkpoints((storage, one), (storage, two), on_total=totals.append)
    assert found.same
    assert [item.compared for item in found.common] == ["digests", "digests"]
    assert totals == [0]


def test_one_changed_block_leaves_the_others_unread(tmp_path: Path) -> None:
    """Tensors that share no block with the change are told by their digests."""
    state = {name: torch.zeros(40_000) for name in "abcd"}
    other = {**state, "c": torch.ones(40_000)}
    storage = LocalStorage(tmp_path)
    before, after = (storage, save(tmp_path, state)), (storage, save(tmp_path, other))
    found = diff_checkpoints(before, after)
    by_name = {item.name: item.compared for item in found.common if item.name.startswith("t.")}
    assert by_name == {"t.a": "digests", "t.b": "bytes", "t.c": "bytes", "t.d": "bytes"}
    assert [item.name for item in found.changed] == ["t.c"]


def test_another_world_size_is_read_and_equal(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one = write_checkpoint(tmp_path, sequence=1, world_size=2)
    with CheckpointTensors(storage, one) as source:
        state = {name.removeprefix("model."): torch.cat(list(source.windows(name))) for name in source.infos}
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    with Checkpointer(tmp_path, {"model": module}, retention=None) as checkpointer:
        record = checkpointer.save(1).result()
    assert record is not None
    found = diff_checkpoints((storage, one), (storage, record.id))
    assert not found.changed
    assert {item.compared for item in found.common} == {"bytes"}


def test_damage_is_not_taken_for_a_difference(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one, two = (write_checkpoint(tmp_path, sequence=n, seed=n) for n in (1, 2))
    file = tmp_path / two / "shard-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DamagedError):
        diff_checkpoints((storage, one), (storage, two))
