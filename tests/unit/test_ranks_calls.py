"""Ranks that make other calls than rank 0 receive an error and find the next common call."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from engine.errors import CoordinationError, LateRanksError
from engine.ranks.calls import PREPARE, RESTORE, SAVE, Call, Calls, Request, end_call
from engine.ranks.coordination import Channel
from tests.support.channels import ImpatientStore, MemoryStore, on_ranks


def save(step: int) -> Request:
    return Request(SAVE, step)


class Ranks:
    """Rank 0 and rank 1 one after the other in this thread: what is not there at once never comes."""

    def __init__(self, timeout_secs: float = 5.0) -> None:
        self.store = ImpatientStore()
        self.missed: list[tuple[str, str]] = []
        self.zero, self.one = (
            Calls(
                Channel(rank, 2, self.store, self.store.clock),
                timeout_secs,
                200.0,
                lambda call, words: self.missed.append((call.key, words)),
                self.store.clock,
            )
            for rank in range(2)
        )


def test_every_rank_gets_the_number_and_the_terms_of_rank_0() -> None:
    def work(channel: Channel) -> list[Call]:
        calls = Calls(channel, 30, 30)
        requests = [save(1), Request(RESTORE, "latest"), Request(PREPARE), save(2)]
        if channel.rank == 0:
            return [calls.decide(request, {"n": i}) for i, request in enumerate(requests)]
        return [calls.join(request) for request in requests]

    results = on_ranks(3, work)
    assert results[0] == results[1] == results[2]
    assert [(call.number, call.key, call.term("n")) for call in results[0]] == [
        (1, "save/1", 0),
        (2, "restore/2", 1),
        (3, "prepare/3", 2),
        (4, "save/4", 3),
    ]


def test_a_call_that_rank_0_does_not_make_fails_after_the_timeout_alone() -> None:
    ranks = Ranks(timeout_secs=5)
    with pytest.raises(LateRanksError) as caught:
        ranks.one.join(save(7))
    assert ranks.store.now == 5
    assert "rank 0 did not reach the save of step 7 within 5 s, but rank 1 did" in str(caught.value)
    decided = ranks.zero.decide(save(8), {"a": 1})
    assert ranks.one.join(save(8)) == decided, "and the next one that all make is found"


def test_a_rank_that_skipped_a_save_tells_rank_0_and_finds_the_next() -> None:
    ranks = Ranks()
    ranks.zero.decide(save(2), {})
    decided = ranks.zero.decide(save(3), {})
    assert ranks.one.join(save(3)) == decided
    ((key, words),) = ranks.missed
    assert key == "save/1"
    assert "did not reach the save of step 2: it is at the save of step 3" in words


def test_a_rank_that_is_behind_is_told_at_once_and_may_still_come() -> None:
    ranks = Ranks()
    decided = ranks.zero.decide(save(6), {})
    with pytest.raises(CoordinationError) as caught:
        ranks.one.join(save(5))
    assert "rank 0 is at the save of step 6, rank 1 at the save of step 5" in str(caught.value)
    assert ranks.store.now == 0
    assert ranks.one.join(save(6)) == decided
    assert ranks.missed == []


def test_the_same_step_again_is_another_call_once_the_first_is_over() -> None:
    ranks = Ranks()
    end_call(ranks.zero.channel, ranks.zero.decide(save(5), {"first": True}))
    decided = ranks.zero.decide(save(5), {"first": False})
    assert ranks.one.join(save(5)) == decided
    assert ranks.missed == [], "a call that is over waits for nobody"


def test_a_call_that_is_over_does_not_hold_back_one_of_an_earlier_step() -> None:
    ranks = Ranks()
    end_call(ranks.zero.channel, ranks.zero.decide(save(9), {}))
    with pytest.raises(LateRanksError, match="it was last at the save of step 9"):
        ranks.one.join(save(4))


def test_different_kinds_of_calls_miss_each_other() -> None:
    ranks = Ranks()
    ranks.zero.decide(Request(RESTORE, "latest"), {})
    with pytest.raises(LateRanksError, match=r"last at the restore of 'latest'.*but rank 1 did"):
        ranks.one.join(save(1))
    decided = ranks.zero.decide(save(2), {})
    assert ranks.one.join(save(2)) == decided


def test_calls_that_a_rank_has_missed_do_not_lengthen_its_deadline() -> None:
    ranks = Ranks(timeout_secs=5)

    class Slow(ImpatientStore):
        def wait(self, keys: list[str], timeout: timedelta, /) -> None:
            super().wait(keys, timeout)
            self.now += 2

    store = Slow()
    for calls in (ranks.zero, ranks.one):
        calls.channel.store, calls.clock = store, store.clock
    for step in (1, 2):
        ranks.zero.decide(save(step), {})
    with pytest.raises(LateRanksError):
        ranks.one.join(save(9))
    assert store.now == 5


def test_rank_0_that_has_come_and_waits_is_waited_for() -> None:
    """The save before takes longer than ranks wait for each other: that is no rank that stays away."""
    ranks = Ranks(timeout_secs=5)
    ranks.zero.begin(save(1))
    assert ranks.zero.deciding == 1
    waited = ranks.store.now
    with pytest.raises(LateRanksError):
        ranks.one.join(save(1))
    assert ranks.store.now - waited == 205


def test_what_rank_0_decides_after_waiting_reaches_all() -> None:
    def work(channel: Channel) -> Call:
        calls = Calls(channel, 30, 30)
        if channel.rank != 0:
            return calls.join(save(1))
        calls.begin(save(1))
        return calls.decide(save(1), {"go": True})

    assert [call.term("go") for call in on_ranks(3, work)] == [True] * 3


def test_a_call_that_rank_0_gives_up_holds_nobody() -> None:
    ranks = Ranks()
    ranks.zero.begin(Request(RESTORE, "latest"))
    waiting = ranks.store.values["call/1"]
    ranks.zero.cancel("the save before hangs")
    ranks.zero.cancel("there is nothing to give up now")
    decided = ranks.zero.decide(save(2), {"go": True})
    assert ranks.one.join(save(2)) == decided
    assert ranks.missed == []
    # One that had read of it before hears why.
    ranks.store.values["call/1"] = waiting
    ranks.one._number = 0
    with pytest.raises(CoordinationError, match="abandoned the restore of 'latest': the save before hangs"):
        ranks.one.join(Request(RESTORE, "latest"))


def test_the_terms_of_another_call_are_never_taken() -> None:
    """Rank 0 was interrupted while it waited, and makes another call."""
    ranks = Ranks()
    ranks.zero.begin(save(1))
    decided = ranks.zero.decide(save(2), {"go": True})
    assert decided.number == 2
    with pytest.raises(LateRanksError):
        ranks.one.join(save(3))
    ranks.one._number = 0
    assert ranks.one.join(save(2)) == decided


def test_what_all_have_read_is_forgotten_and_nothing_later() -> None:
    store = MemoryStore()
    zero = Calls(Channel(0, 2, store), 5, 5)
    zero.begin(save(1))
    zero.decide(save(1), {})
    mark = zero.mark()
    zero.decide(save(2), {})
    zero.forget(mark)
    assert list(store.values) == ["call/2"]
    assert zero.mark() == 1, "nothing is forgotten twice"


def test_a_rank_alone_needs_no_store() -> None:
    alone = Calls(Channel(0, 1, None), 5, 5)
    alone.begin(save(1))
    answers: list[Any] = [alone.decide(save(step), {}).number for step in (1, 2)]
    assert answers == [1, 2]
