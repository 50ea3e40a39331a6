"""The bytes of tensors in row-major order, for any memory layout."""

from __future__ import annotations

import pytest
import torch

from engine.save import raw_bytes
from engine.save.raw_bytes import host_bytes, pieces, some_bytes

BASE = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)

TENSORS = {
    "plain": BASE,
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(3, 0),
    "bool": torch.tensor([True, False, True]),
    "bf16": BASE.bfloat16(),
    "transposed": BASE.transpose(0, 2),
    "rows apart": BASE[:, ::2],
    "channels last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "one negated": torch.tensor([1 + 2j]).conj().imag,  # contiguous, unlike several
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
}


def expected(tensor: torch.Tensor) -> bytes:
    flat = tensor.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


@pytest.mark.parametrize("name", TENSORS)
def test_any_part_of_any_tensor(name: str) -> None:
    tensor = TENSORS[name]
    whole, size = expected(tensor), tensor.element_size()
    for begin in range(0, len(whole), 3 * size):
        for end in range(begin + size, len(whole) + 1, 7 * size):
            found = some_bytes(tensor, begin, end)
            assert bytes(found.numpy()) == whole[begin:end]
    assert b"".join(bytes(piece) for piece in pieces(tensor)) == whole


@pytest.mark.parametrize("name", TENSORS)
def test_memory_is_taken_as_it_is_only_where_it_reads_so(name: str) -> None:
    view = host_bytes(TENSORS[name])
    assert (view is not None) == (name in ("plain", "scalar", "empty", "bool", "bf16"))
    assert view is None or bytes(view) == expected(TENSORS[name])


def test_pieces_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_bytes, "PIECE_BYTES", 64)
    tensor = TENSORS["transposed"]
    found = [bytes(piece) for piece in pieces(tensor)]
    assert max(map(len, found)) == 64
    assert b"".join(found) == expected(tensor)
