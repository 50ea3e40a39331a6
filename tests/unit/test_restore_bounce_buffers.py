"""Tensors that lie oddly in memory come back with their values and strides, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import RestoreFailedError, UnsavableValueError
from engine.native import kernels
from engine.restore.bounce_buffers import BounceBuffers, may_overlap, neighbours
from tests.support.training import same_bits

Make = Callable[[float], torch.Tensor]


def buffer(tensor: torch.Tensor) -> Any:
    module = nn.Module()
    module.register_buffer("x", tensor)
    return module


HOLDERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "module": (buffer, lambda module: module.x),
    "dict": (lambda tensor: {"x": tensor}, lambda entry: entry["x"]),
    "tensor": (lambda tensor: tensor, lambda tensor: tensor),
}
ODD: dict[str, Make] = {
    "expanded": lambda v: torch.full((1,), v).expand(4),
    "expanded scalar": lambda v: torch.tensor(v).expand(2, 3),
    "expanded in part": lambda v: (torch.arange(3.0) + v).unsqueeze(1).expand(3, 4),
    "overlapping windows": lambda v: (torch.arange(6.0) + v).unfold(0, 3, 1),
    "expanded bytes": lambda v: torch.tensor([int(v)], dtype=torch.float8_e4m3fn).expand(3),
    "expanded words": lambda v: torch.tensor([int(v)], dtype=torch.uint16).expand(3),
    "channels last": lambda v: (
        (torch.arange(48.0) + v).view(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    ),
    "transposed": lambda v: (torch.arange(6.0) + v).view(2, 3).t(),
    "every other": lambda v: (torch.arange(12.0) + v)[::2],
    "large every other": lambda v: (torch.arange(60000.0) + v).view(2, -1)[:, ::2],
    "zero-size": lambda v: torch.empty(0, 3),
    "scalar": lambda v: torch.tensor(v),
    "nan": lambda v: torch.tensor([torch.nan, v]).expand(2, 2),
    "conjugated": lambda v: (torch.arange(4.0) + v + 2j).conj(),
    "conjugated, expanded": lambda v: torch.tensor([v + 2j]).expand(3).conj(),
    "negated": lambda v: torch.complex(torch.ones(4), torch.arange(4.0) + v).conj().imag,
    # Contiguous, as torch calls it, and yet no view of bytes.
    "one of every other": lambda v: (torch.arange(12.0) + v)[::2][1:2],
    "one negated": lambda v: torch.complex(torch.ones(1), torch.tensor([v])).conj().imag,
    "real part": lambda v: (torch.arange(4.0) + v + 2j).real,
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", ODD)
def test_values_are_exact_and_live_strides_stay(kind: str, holder: str, tmp_path: Path) -> None:
    wrap, tensor_of = HOLDERS[holder]
    make = ODD[kind]
    with Checkpointer(tmp_path, {"e": wrap(make(5.0))}, check_snapshots=True) as checkpointer:
        checkpointer.save(1).result()
    entry = wrap(make(1.0))
    live = tensor_of(entry)
    strides, address = live.stride(), live.data_ptr()
    with Checkpointer(tmp_path, {"e": entry}, read_only=True) as checkpointer:
        checkpointer.restore()
    assert tensor_of(entry) is live
    assert (live.stride(), live.data_ptr()) == (strides, address)
    assert same_bits(live.resolve_conj().resolve_neg(), make(5.0).resolve_conj().resolve_neg())


def test_one_element_with_a_stride_is_read_without_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is into the memory of a device."""
    monkeypatch.setattr(kernels, "library", None)
    with Checkpointer(tmp_path, {"e": buffer(ODD["one of every other"](5.0))}) as checkpointer:
        checkpointer.save(1).result()
        live = buffer(ODD["one of every other"](1.0))
    with Checkpointer(tmp_path, {"e": live}, read_only=True) as checkpointer:
        checkpointer.restore()
    assert live.x.tolist() == [7]


def views(value: float) -> Any:
    """A module whose buffers are views of one storage, two of which overlap."""
    module = nn.Module()
    base = torch.arange(8.0) + value
    for name, view in (("left", base[:5]), ("right", base[3:]), ("all", base)):
        module.register_buffer(name, view)
    return module


def test_views_of_one_storage_come_back_where_they_agree(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"e": views(5)}) as checkpointer:
        checkpointer.save(1).result()
    live = views(0)
    with Checkpointer(tmp_path, {"e": live}, read_only=True) as checkpointer:
        checkpointer.restore()
    assert live.all.tolist() == (torch.arange(8.0) + 5).tolist()
    live.all.zero_()
    assert not live.left.any()
    assert not live.right.any()


@pytest.mark.parametrize(
    ("saved", "live", "words"),
    [
        (buffer(torch.arange(3.0)), buffer(torch.zeros(1).expand(3)), r"elements of e\.x share memory here"),
        (
            {"a": torch.zeros(2), "b": torch.ones(2)},
            dict.fromkeys(("a", "b"), torch.zeros(2)),
            r"e\.[ab] and e\.[ab] share memory here, but the checkpoint holds different values",
        ),
    ],
    ids=["expanded", "the same tensor twice"],
)
def test_different_values_for_the_same_memory_are_never_mixed(
    saved: Any, live: Any, words: str, tmp_path: Path
) -> None:
    with Checkpointer(tmp_path, {"e": saved}) as checkpointer:
        checkpointer.save(1).result()
    with (
        Checkpointer(tmp_path, {"e": live}, read_only=True) as checkpointer,
        pytest.raises(RestoreFailedError, match=words),
    ):
        checkpointer.restore()


@pytest.mark.parametrize(
    ("shape", "stride", "overlaps"),
    [
        ((2, 3), (3, 1), False),
        ((2, 3), (1, 2), False),
        ((3,), (0,), True),
        ((1, 3), (0, 1), False),
        ((4, 3), (1, 1), True),
        ((3, 3), (2, 3), True),  # it does not, but that takes more to see: it is read beside, no more
        ((0, 3), (0, 0), False),
        ((), (), False),
    ],
)
def test_overlaps_are_seen_in_the_strides(
    shape: tuple[int, ...], stride: tuple[int, ...], overlaps: bool
) -> None:
    assert may_overlap(torch.zeros(20).as_strided(shape, stride)) == overlaps


def test_neighbours_are_seen_behind_a_long_one() -> None:
    assert neighbours([(0, 100, "long"), (10, 20, "a"), (30, 40, "b"), (100, 110, "c")]) == {
        "long": "a",
        "a": "long",
        "b": "long",
    }


def test_ordinary_tensors_are_read_into_as_they_are() -> None:
    tensors = {"a": torch.zeros(3), "b": nn.Parameter(torch.zeros(2, 2).t()), "c": torch.zeros(0)}
    assert all(BounceBuffers(tensors).tensors[name] is tensor for name, tensor in tensors.items())


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"a sparse_coo tensor .*; store its to_dense\(\), or"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), r"a sparse_csr tensor .*; store its to_dense\(\), or"),
    "mkldnn": (lambda: torch.ones(3).to_mkldnn(), r"a mkldnn tensor .*; store its to_dense\(\)$"),
    "masked": (
        lambda: torch.masked.masked_tensor(torch.ones(3), torch.tensor([True, False, True])),
        r"a MaskedTensor tensor .*; store the tensors that it is made of",
    ),
    "meta": (lambda: torch.empty(3, device="meta"), r"a meta tensor .*; give the module memory"),
    "nested": (nested, r"a nested tensor .*; store its unbind\(\)"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        r"a quantized \(quint8\) tensor .*; store its int_repr\(\)",
    ),
    "complex128": (lambda: torch.ones(2, dtype=torch.complex128), r"complex128 .*; store torch\.view"),
    "bits": (lambda: torch.ones(2, dtype=torch.uint8).view(torch.bits8), r"bits8 .*; store its \.view\("),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_form_is_refused_in_one_sentence(kind: str, holder: str, tmp_path: Path) -> None:
    make, words = REFUSED[kind]
    name = "e" if holder == "tensor" else r"e\.x"
    with (
        Checkpointer(tmp_path, {"e": HOLDERS[holder][0](make())}) as checkpointer,
        pytest.raises(UnsavableValueError, match=rf"^{name}: .*{words}"),
    ):
        checkpointer.save(1)


def test_an_uninitialised_module_is_refused_by_name(tmp_path: Path) -> None:
    with (
        Checkpointer(tmp_path, {"e": nn.Sequential(nn.LazyLinear(3))}) as checkpointer,
        pytest.raises(UnsavableValueError, match=r"^e\.0\.weight: an uninitialised tensor .* run the"),
    ):
        checkpointer.save(1)


def test_nothing_is_restored_into_what_has_no_memory(tmp_path: Path) -> None:
    live = nn.Linear(2, 3, device="meta")
    with Checkpointer(tmp_path, {"e": nn.Linear(2, 3), "n": {"n": 1}}) as checkpointer:
        checkpointer.save(1).result()
    counter = {"n": 0}
    with (
        Checkpointer(tmp_path, {"e": live, "n": counter}, read_only=True) as checkpointer,
        pytest.raises(UnsavableValueError, match=r"e\.weight: a meta tensor cannot"),
    ):
        checkpointer.restore()
    assert counter == {"n": 0}


def test_a_list_that_contains_itself_is_refused_by_name(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    endless: list[object] = []
    endless.append(endless)
    state = {"model": module, "optimizer": torch.optim.SGD(module.parameters()), "v": {"x": endless}}
    with (
        Checkpointer(tmp_path, state) as checkpointer,
        pytest.raises(UnsavableValueError, match=r"^v\.x\.0\..*: nested deeper than 48 levels"),
    ):
        checkpointer.save(1)
