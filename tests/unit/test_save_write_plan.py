"""The agreement on who writes what uses only the store, and a rank's failure leaves no rank waiting."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import (
    LateRanksError,
    PeerFailedError,
    StateError,
    StorageFullError,
    UnsavableValueError,
)
from engine.format.layout import Chunk
from engine.format.manifest import TensorInfo
from engine.ranks.coordination import Channel
from engine.save import write_plan as plan_module
from engine.save.division import divide
from engine.save.write_plan import Compared, Watched, agree_on_plan
from engine.state.sharing import SMALL, Offer
from tests.support.boxes import box, shards, whole
from tests.support.channels import ImpatientStore, MemoryStore, on_ranks


def agree(held: list[list[Chunk]], problems: dict[int, Exception] | None = None) -> list[Any]:
    def work(channel: Channel) -> Any:
        problem = (problems or {}).get(channel.rank)
        return agree_on_plan(channel, "save/1/plan", Offer(held[channel.rank]), problem, 30)

    return on_ranks(len(held), work)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_gets_its_parts_and_rank_0_the_tensors(world_size: int) -> None:
    held: list[list[Chunk]] = [[whole("both", 9, 2), whole("s")] for _ in range(world_size)]
    for chunks, chunk in zip(held, shards("cut", (7, 3), world_size, dtype="BF16"), strict=True):
        chunks.append(chunk)
    results = agree(held)
    assert [plan.parts for plan in results] == divide(held)
    assert results[0].tensors == {
        "both": TensorInfo("F32", (9, 2)),
        "s": TensorInfo("F32", ()),
        "cut": TensorInfo("BF16", (7, 3)),
    }
    assert all(plan.tensors == {} for plan in results[1:])


def test_names_of_any_kind_survive() -> None:
    held = [[whole('odd "näme" with \\ and \n', 3)]]
    (plan,) = agree(held)
    assert plan.parts[0].chunk == held[0][0]
    assert list(plan.tensors) == ['odd "näme" with \\ and \n']


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_has_failed_already_tells_the_others(rank: int) -> None:
    problem = UnsavableValueError("loader.pool: a function is neither a tensor nor JSON")
    results = agree([[whole("t", 3)]] * 3, {rank: problem})
    assert results[rank] is problem
    for other, result in enumerate(results):
        if other != rank:
            assert isinstance(result, PeerFailedError)
            assert str(result) == f"rank {rank}: {problem}"


def test_a_failure_without_words_is_named_by_its_class() -> None:
    """Not taken for none: the others would be told that the boxes leave a hole."""
    results = agree([shards("t", (4,), 2)[0:1], []], {1: MemoryError()})
    assert str(results[0]) == "rank 1: MemoryError"


@pytest.mark.parametrize(
    ("problem", "passes"), [(StorageFullError("full"), True), (UnsavableValueError("a lambda"), False)]
)
def test_the_others_hear_whether_the_failure_may_pass(problem: Exception, passes: bool) -> None:
    for failed in (0, 1):
        results = agree([[whole("t", 3)]] * 2, {failed: problem})
        assert results[1 - failed].may_pass is passes


def test_optimizer_state_on_one_rank_alone_is_every_ranks_state_error() -> None:
    held, parameter = whole("o.state.w.m", 2), whole("model.w", 2)
    offers = [Offer([parameter, held]), Offer([parameter], stateless=["o.state.w"])]
    results = on_ranks(2, lambda channel: agree_on_plan(channel, "k", offers[channel.rank], None, 30))
    for result in results:
        assert isinstance(result, StateError)
        assert "o.state.w exists on rank 0 but not on rank 1" in str(result)


def test_all_failures_are_named() -> None:
    results = agree([[]] * 3, {1: ValueError("one"), 2: ValueError("two")})
    assert str(results[0]) == "rank 1: one; rank 2: two"


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([[whole("t", 4)], [whole("t", 5)]], "rank 0 has"),
        ([[box("t", (4,), (0,), (1,))], [box("t", (4,), (3,), (1,))]], "leave a hole"),
    ],
)
def test_boxes_that_do_not_fit_together_are_every_ranks_state_error(
    held: list[list[Chunk]], words: str
) -> None:
    results = agree(held)
    assert [type(result) for result in results] == [StateError] * 2
    assert all(words in str(result) for result in results)


def test_a_bug_in_dividing_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(plan_module, "divide", broken)
    results = agree([[whole("t", 3)]] * 2)
    assert all(isinstance(result, Exception) for result in results)
    assert "a bug" in str(results[1])


def test_late_ranks_are_named_to_those_that_wait() -> None:
    store = ImpatientStore()
    results = []
    offer = b'{"aliases":{},"buffers":[],"error":"","held":[],"on_device":false}'
    Channel(1, 3, store).gather("k/held", offer, 0)
    for rank in (0, 1):
        with pytest.raises((LateRanksError, PeerFailedError)) as caught:
            agree_on_plan(Channel(rank, 3, store, store.clock), "k", Offer([]), None, 7)
        assert caught.value.may_pass
        results.append(str(caught.value))
    assert all("rank 2 did not report within 7 s" in result for result in results)


def test_a_plan_leaves_nothing_in_the_store() -> None:
    store = MemoryStore()
    on_ranks(3, lambda channel: agree_on_plan(channel, "k", Offer([whole("t", 3)]), None, 30), store)
    assert store.values == {}


def test_aliases_of_all_ranks_reach_the_manifest_but_no_name_that_is_a_tensor_somewhere() -> None:
    """The first pipeline stage ties its head to its embedding, the last one holds its own head."""
    offers = [
        Offer([whole("embed", 3)], aliases={"head": "embed", "more": "embed"}),
        Offer([whole("head", 3), whole("norm", 2)], aliases={"last": "norm", "more": "norm"}),
    ]
    first, second = on_ranks(2, lambda channel: agree_on_plan(channel, "k", offers[channel.rank], None, 30))
    assert first.aliases == {"more": "embed", "last": "norm"}
    assert second.aliases == {}


def test_each_rank_hears_what_it_compares_and_what_of_it_is_new() -> None:
    held = [[whole("b", 4), whole("a", 2), whole("mine", 1)], [whole("a", 2), whole("b", 4)], [whole("c")]]
    compared = Compared({(whole("b", 4), (0, 1))})
    plans = on_ranks(
        3, lambda channel: agree_on_plan(channel, "k", Offer(held[channel.rank]), None, 30, compared)
    )
    assert [plan.watched for plan in plans] == [
        [Watched(0, (1, 0), frozenset({0}))],
        [Watched(0, (0, 1), frozenset({0}))],
        [],
    ]
    assert [box.chunk.name for box in plans[0].groups[0].boxes] == ["a", "b"]


def test_nothing_is_compared_when_that_is_off() -> None:
    plans = on_ranks(2, lambda channel: agree_on_plan(channel, "k", Offer([whole("a", 2)]), None, 30))
    assert [(plan.watched, plan.groups) for plan in plans] == [([], []), ([], ())]


def test_buffers_of_other_ranks_are_in_the_manifest_and_stay_each_ranks_own() -> None:
    """A large buffer that differed once is kept from then on, without another comparison."""
    compared = Compared()
    tensors = []
    for digests in (["x", "y"], ["z", "z"]):
        offers = [Offer([whole("mean", 2), whole("mask", 9)], {0: SMALL, 1: digest}) for digest in digests]

        def work(channel: Channel, offers: list[Offer] = offers) -> Any:
            return agree_on_plan(channel, "k", offers[channel.rank], None, 30, compared)

        first, second = on_ranks(2, work)
        assert [part.chunk.name for part in first.parts] == ["mean", "mask"]
        assert [part.chunk.name for part in second.parts] == ["per_rank.00001.mean", "per_rank.00001.mask"]
        tensors.append(set(first.tensors))
    own = {"per_rank.00001.mean", "per_rank.00001.mask"}
    assert tensors == [{"mean", "mask", *own}, {"mean", "mask", *own}]
