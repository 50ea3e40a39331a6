"""A shard put together from tensors while it is written: the bytes and digests of one that was in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load

from engine.convert.stream import ShardStream
from engine.convert.tensors import windows_of
from engine.errors import DamagedError
from engine.format.digest import block_digests
from engine.format.layout import ShardLayout, plan_files
from engine.storage.source import in_order
from tests.support.boxes import whole

TENSORS = {
    "wide": torch.arange(120_000, dtype=torch.float32).reshape(300, 400),
    "empty": torch.empty(0),
    "scalar": torch.tensor(7.0),
    "tail": torch.arange(33, dtype=torch.float32),
}


def layout(**counts: int) -> ShardLayout:
    (planned,) = plan_files(0, [whole(name, *TENSORS[name].shape) for name in TENSORS])
    return planned


def rows(name: str) -> Iterator[torch.Tensor]:
    tensor = TENSORS[name].double()  # converted to what the layout says
    if tensor.ndim < 2:
        yield tensor
        return
    yield from tensor.split(7)


@pytest.mark.parametrize("window_bytes", [4096, 65536, 10_000, 1 << 20])
def test_bytes_and_digests(window_bytes: int) -> None:
    told: list[int] = []
    stream = ShardStream(layout(), rows, told.append)
    data = bytearray()
    for window in in_order(stream, window_bytes):
        data += window.view
        window.release()
    found = load(bytes(data))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
    assert stream.digests() == block_digests(bytes(data))
    assert sum(told) == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_conjugate_is_stored_by_its_values() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    (planned,) = plan_files(0, [whole("c", 2, dtype="C64")])
    stream = ShardStream(planned, lambda name: windows_of(values.conj()), lambda count: None)
    data = b"".join(bytes(window.view) for window in in_order(stream, 1 << 20))
    assert data[len(planned.header) :] == values.conj().resolve_conj().numpy().tobytes()


@pytest.mark.parametrize("name", ["wide", "tail"])
@pytest.mark.parametrize("more", [1, -1])
def test_a_tensor_of_another_size_than_planned(name: str, more: int) -> None:
    def wrong(asked: str) -> Iterator[torch.Tensor]:
        given = list(rows(asked))
        if asked == name:
            given = [*given, given[0]] if more > 0 else given[:-1]
        return iter(given)

    with pytest.raises(DamagedError, match=rf"{name} has"):
        list(in_order(ShardStream(layout(), wrong, lambda count: None), 4096))
