"""What one rank digests of its replicas, and what rank 0 concludes from all ranks' digests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from engine.save import replicas
from engine.save.sampling import BLOCK_BYTES, MOST_ON_DEVICE
from engine.state.local_boxes import LocalBox
from tests.support.replicas import SIZES, Rank, differences, gapped, values


@pytest.mark.parametrize("looks", [1, 2, 3])
@pytest.mark.parametrize("spoiled", ["", *SIZES])
def test_values_are_compared_whatever_their_memory(spoiled: str, looks: int) -> None:
    here, there = values(), {name: gapped(tensor) for name, tensor in values().items()}
    if spoiled:
        there[spoiled] += 1
    expected = [f"{spoiled} differs between rank 0 and rank 1"] if spoiled else []
    assert differences([here, there], 5, looks=looks) == expected


def test_one_element_is_found_where_it_is_new_and_by_its_block_later() -> None:
    here, there = values(), values()
    there["large"][299, 49] += 1
    assert differences([here, there], 0) == ["large differs between rank 0 and rank 1"]
    later = [differences([here, there], number, looks=2) for number in range(15)]
    assert sum(map(bool, later)) == 1, "in one of 15 blocks, whose turn comes"


@pytest.mark.parametrize("replaced", SIZES)
def test_tensors_that_are_replaced_are_looked_at_anew(replaced: str) -> None:
    tensors = values()
    rank = Rank(0, tensors)
    rank.plan()
    rank.replicas.look(rank.held, 0)
    before = rank.replicas.look(rank.held, 1).texts()
    rank.held = [
        LocalBox(item.chunk, item.tensor.clone() + 1) if item.chunk.name == replaced else item
        for item in rank.held
    ]
    assert rank.replicas.look(rank.held, 1).texts() != before


def test_what_a_committed_save_has_compared_is_not_new_until_a_restore() -> None:
    rank = Rank(0, values())
    groups = rank.plan()
    compared = rank.replicas.compared
    assert compared is not None
    rank.replicas.confirm()
    assert not compared.boxes, "nothing was compared yet"
    rank.replicas.look(rank.held, 0)
    rank.replicas.confirm()
    assert compared.boxes == {(box.chunk, (0, 1)) for box in groups[0].boxes}
    rank.replicas.forget()
    rank.replicas.confirm()
    assert not compared.boxes, "the save before the restore counts for nothing"


def test_a_rank_that_sends_nothing_differs() -> None:
    ranks = [Rank(number, values()) for number in range(2)]
    for rank in ranks:
        rank.plan()
    found = ranks[0].replicas.look(ranks[0].held, 0)
    assert len(found.differences([found.texts(), {}])) == len(SIZES)


@pytest.mark.parametrize("lie", [lambda tensor: tensor, gapped], ids=["as they read", "with gaps"])
def test_a_large_tensor_is_read_whole_once_and_by_a_block_after_that(
    lie: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[int] = []
    digest, pieces = replicas._digest, replicas.pieces

    def one(view: memoryview) -> bytes:
        digested.append(view.nbytes)
        return digest(view)

    def in_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
        for piece in pieces(tensor):
            digested.append(piece.nbytes)
            yield piece

    monkeypatch.setattr(replicas, "_digest", one)
    monkeypatch.setattr(replicas, "pieces", in_pieces)
    tensors = {name: lie(tensor) for name, tensor in values().items()}
    small = sum(tensor.nbytes for name, tensor in tensors.items() if name != "large")
    rank = Rank(0, tensors)
    rank.plan()
    amounts = []
    for number in range(3):
        rank.replicas.look(rank.held, number).texts()
        amounts.append(sum(digested))
        digested.clear()
    assert amounts == [small + tensors["large"].nbytes, small + BLOCK_BYTES, small + BLOCK_BYTES]


def test_where_some_rank_has_a_device_fewer_are_compared_at_a_time() -> None:
    rank = Rank(0, {f"t{number}": torch.zeros(2) for number in range(3 * MOST_ON_DEVICE)})
    rank.plan(on_device=True)
    rank.replicas.look(rank.held, 0)
    assert [len(rank.replicas.look(rank.held, number).found[0]) for number in (1, 2)] == [MOST_ON_DEVICE] * 2
