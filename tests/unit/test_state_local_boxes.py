"""Which boxes a rank holds; and what cannot be stored is refused by name, before anything is planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine.errors import DamagedError, UnsavableValueError
from engine.format.element_types import ITEMSIZES
from engine.state.local_boxes import local_boxes
from engine.state.tensor_format import from_torch, to_torch
from tests.support.boxes import whole


def test_plain_tensors_are_one_box_each_of_live_memory() -> None:
    tensors = {"a.b": torch.ones(2, 3), "s": torch.tensor(True), "e": torch.zeros(0, 4, dtype=torch.bfloat16)}
    held = local_boxes(tensors)
    assert {h.chunk.name: h.chunk for h in held} == {
        "a.b": whole("a.b", 2, 3),
        "s": whole("s", dtype="BOOL"),
        "e": whole("e", 0, 4, dtype="BF16"),
    }
    assert all(h.tensor.data_ptr() == tensors[h.chunk.name].data_ptr() for h in held)


def test_names_are_not_taken_apart() -> None:
    names = ["a", "a.b", "a.b.c", "a/b", "0", "ümlaut", "with space"]
    assert [h.chunk.name for h in local_boxes({name: torch.ones(1) for name in names})] == names


def test_parameters_are_held_without_their_gradients() -> None:
    (held,) = local_boxes({"w": nn.Parameter(torch.ones(2))})
    assert not held.tensor.requires_grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.ones(3).to_mkldnn(), "mkldnn"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8), "quint8"),
        (lambda: torch.ones(3, dtype=torch.complex128), "complex128"),
        (lambda: nn.LazyLinear(2).weight, "uninitialised"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_cannot_be_stored_is_refused_by_name(make: Any, words: str) -> None:
    with pytest.raises(UnsavableValueError, match=words) as caught:
        local_boxes({"fine": torch.ones(1), "loader.table": make()})
    assert str(caught.value).startswith("loader.table: ")


@pytest.mark.parametrize("name", ["__metadata__", "a" * 5000])
def test_a_name_that_no_file_could_hold_is_refused(name: str) -> None:
    with pytest.raises(UnsavableValueError, match="cannot name a tensor"):
        local_boxes({name: torch.ones(1)})


def test_every_element_type_of_the_format_has_one_of_torch_and_back() -> None:
    for name, size in ITEMSIZES.items():
        dtype = to_torch(name)
        assert dtype.itemsize == size
        assert from_torch(dtype, "t") == name


def test_an_element_type_that_torch_lacks_is_damage() -> None:
    with pytest.raises(DamagedError, match="F6_E2M3"):
        to_torch("F6_E2M3")
