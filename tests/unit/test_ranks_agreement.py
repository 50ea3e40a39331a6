"""Agreements: one rank's answer or error becomes every rank's, in the same class."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import (
    CoordinationError,
    DamagedError,
    LateRanksError,
    NotFoundError,
    PeerFailedError,
    SelectorError,
    StateMismatchError,
    StorageUnavailableError,
)
from engine.ranks import agreement
from engine.ranks.agreement import LATE_VERDICT_SECS, all_agree, rank0_decides
from engine.ranks.coordination import Channel
from tests.support.channels import ImpatientStore, MemoryStore, on_ranks


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("value", [None, 0, "text", {"a": [1, {"b": None}]}], ids=repr)
def test_rank_0s_answer_is_everybodys(world_size: int, value: Any) -> None:
    asked = []

    def work(channel: Channel) -> Any:
        return rank0_decides(channel, "k", lambda: asked.append(channel.rank) or value, 30)

    assert on_ranks(world_size, work) == [value] * world_size
    assert asked == [0]


@pytest.mark.parametrize(
    "error", [SelectorError("there is none"), NotFoundError("gone"), DamagedError("bad")], ids=repr
)
def test_rank_0s_error_is_everybodys_in_its_own_class(error: Exception) -> None:
    def refuse() -> None:
        raise error

    results = on_ranks(3, lambda channel: rank0_decides(channel, "k", refuse, 30))
    assert [type(result) for result in results] == [type(error)] * 3
    assert [str(result) for result in results] == [str(error)] * 3


def test_a_foreign_error_of_rank_0_keeps_its_class_there_and_its_name_elsewhere() -> None:
    def fail() -> None:
        raise ZeroDivisionError("1/0")

    results = on_ranks(3, lambda channel: rank0_decides(channel, "k", fail, 30))
    assert isinstance(results[0], ZeroDivisionError)
    for result in results[1:]:
        assert isinstance(result, PeerFailedError)
        assert str(result) == "rank 0 failed: ZeroDivisionError: 1/0"


def test_an_answer_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a restore it is the manifest and all chunks: megabytes."""
    parsed: list[bytes] = []
    real = agreement.parse_canonical

    def noting(raw: bytes, *, what: str) -> Any:
        parsed.append(raw)
        return real(raw, what=what)

    monkeypatch.setattr(agreement, "parse_canonical", noting)
    assert on_ranks(2, lambda channel: rank0_decides(channel, "k", lambda: "word", 30)) == ["word"] * 2
    assert len(parsed) == 1
    parsed.clear()
    agree({1: DamagedError("mine")}, 2)
    assert len(parsed) == 4, "two notes at rank 0, and the verdict on each rank"


def test_an_error_without_words_is_named_by_its_class() -> None:
    def fail() -> None:
        raise AssertionError

    assert "AssertionError" in str(on_ranks(2, lambda channel: rank0_decides(channel, "k", fail, 30))[1])

    def refuse() -> None:
        raise NotFoundError

    assert str(on_ranks(2, lambda channel: rank0_decides(channel, "k", refuse, 30))[1]) == "NotFoundError"


def test_a_name_that_is_no_error_class_makes_none() -> None:
    """What arrives over the wire is looked up among Holdfast's own errors only."""

    class annotations(Exception):  # also a name in engine.errors
        pass

    def fail() -> None:
        raise annotations("odd")

    assert isinstance(on_ranks(2, lambda channel: rank0_decides(channel, "k", fail, 30))[1], PeerFailedError)


def agree(problems: dict[int, Exception], world_size: int = 3) -> list[Any]:
    return on_ranks(world_size, lambda channel: all_agree(channel, "k", problems.get(channel.rank), 30))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_without_a_problem_all_go_on(world_size: int) -> None:
    assert agree({}, world_size) == [None] * world_size


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("kind", [DamagedError, StateMismatchError, StorageUnavailableError])
def test_one_ranks_problem_stops_all_with_its_words(rank: int, kind: type[Exception]) -> None:
    results = agree({rank: kind("block 7 has changed")})
    assert [type(result) for result in results] == [kind] * 3
    assert {str(result) for result in results} == {"block 7 has changed"}


def test_ranks_with_the_same_kind_of_problem_keep_their_own_words() -> None:
    results = agree({1: StateMismatchError("mine"), 2: StateMismatchError("yours")})
    assert [str(result) for result in results] == ["mine", "mine", "yours"]


@pytest.mark.parametrize(
    ("problems", "kind"),
    [
        ({0: DamagedError("d"), 1: StorageUnavailableError("s")}, DamagedError),
        ({1: StorageUnavailableError("s"), 2: DamagedError("d")}, StorageUnavailableError),
        ({0: NotFoundError("n"), 2: DamagedError("d")}, NotFoundError),
        ({1: DamagedError("d"), 2: KeyError("k")}, DamagedError),
    ],
)
def test_different_problems_become_one_kind(problems: dict[int, Exception], kind: type[Exception]) -> None:
    """A rank that walked back while another gave up would wait for it until the time-out."""
    results = agree(problems)
    assert [type(result) for result in results] == [kind] * 3
    assert results[2].__cause__ is (problems[2] if 2 in problems and type(problems[2]) is not kind else None)


def test_a_foreign_error_stays_itself_on_its_rank() -> None:
    mine = KeyError("k")
    results = agree({1: mine})
    assert results[1] is mine
    assert all(isinstance(result, PeerFailedError) for result in (results[0], results[2]))
    assert "rank 1 failed: KeyError" in str(results[0])


def test_a_problem_on_one_process_is_raised_as_it_is() -> None:
    mine = KeyError("k")
    assert agree({0: mine}, 1) == [mine]


def test_late_ranks_are_named_to_the_ranks_that_are_on_time() -> None:
    store = ImpatientStore()
    Channel(1, 3, store).gather("k/all", b'{"error":null,"value":null}', 0)
    with pytest.raises(LateRanksError, match="rank 2 did not report within 7 s"):
        all_agree(Channel(0, 3, store, store.clock), "k", None, 7)
    with pytest.raises(LateRanksError, match="rank 2 did not report within 7 s"):
        all_agree(Channel(1, 3, store, store.clock), "k", None, 7)


def test_a_late_rank_hears_that_it_was_late() -> None:
    store = ImpatientStore()
    with pytest.raises(LateRanksError):
        all_agree(Channel(0, 2, store, store.clock), "k", None, 7)
    with pytest.raises(LateRanksError, match="rank 1 did not report"):
        all_agree(Channel(1, 2, store, store.clock), "k", None, 7)


def test_noise_in_the_store_is_an_error_not_an_answer() -> None:
    store = MemoryStore()
    store.set("k", b"\x80not json")
    with pytest.raises((CoordinationError, DamagedError)):
        rank0_decides(Channel(1, 2, store), "k", lambda: None, 5)


class SlowToRead(MemoryStore):
    """A store whose verdict the other ranks read late; it notes whether it still was there then."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.left = threading.Event()
        self.read_after_rank_0_left: list[bool] = []

    def get(self, key: str, /) -> bytes:
        if key == self.key:
            # Rank 0 would have returned by now if it did not wait: nothing else keeps it.
            self.read_after_rank_0_left.append(self.left.wait(0.2))
        return super().get(key)


def refusal() -> None:
    raise SelectorError("there is none")


@pytest.mark.parametrize(
    ("key", "exchange"),
    [
        ("k/verdict", lambda channel: all_agree(channel, "k", None, 30)),
        ("k/verdict", lambda channel: all_agree(channel, "k", DamagedError("d"), 30)),
        ("k", lambda channel: rank0_decides(channel, "k", refusal, 30)),
    ],
    ids=["agreed", "refused", "decided"],
)
def test_rank_0_stays_until_the_others_have_read_the_verdict(
    key: str, exchange: Callable[[Channel], Any]
) -> None:
    """Its process hosts the store: seen under load, a rank lost the connection before it had read why."""
    store = SlowToRead(key)

    def work(channel: Channel) -> None:
        try:
            exchange(channel)
        finally:
            if channel.rank == 0:
                store.left.set()

    on_ranks(3, work, store)
    assert store.read_after_rank_0_left == [False, False]
    assert store.values == {}, "an exchange leaves nothing in the store"


def test_a_late_rank_holds_rank_0_no_longer() -> None:
    store = ImpatientStore()
    with pytest.raises(LateRanksError):
        all_agree(Channel(0, 2, store, store.clock), "k", None, 7)
    assert store.now == 7
    assert "k/verdict" in store.values, "should it come after all"


def test_those_that_came_hold_rank_0_only_a_little_longer() -> None:
    store = ImpatientStore()
    Channel(1, 3, store).gather("k/all", b'{"error":null,"value":null}', 0)
    with pytest.raises(LateRanksError):
        all_agree(Channel(0, 3, store, store.clock), "k", None, 7)
    assert store.now == 7 + LATE_VERDICT_SECS


def test_an_error_of_rank_0_alone_is_raised_within_the_calls_own_time() -> None:
    store = ImpatientStore()

    def refuse() -> None:
        raise SelectorError("there is none")

    with pytest.raises(SelectorError):
        rank0_decides(Channel(0, 2, store, store.clock), "k", refuse, 3)
    assert store.now == 3
