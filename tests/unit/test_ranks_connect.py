"""How the ranks of one Checkpointer find each other; with real ranks in tests/distributed/test_groups.py."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine.errors import ConfigError, CoordinationError, LateRanksError
from engine.ranks import connect
from engine.ranks.connect import ADDRESS, Address, connect_ranks, reachable_host
from engine.ranks.coordination import Channel
from tests.support.channels import BrokenStore, ImpatientStore, MemoryStore, on_ranks


def test_one_process_needs_no_store() -> None:
    coordinator = connect_ranks(5)
    assert (coordinator.rank, coordinator.world_size) == (0, 1)
    channel = coordinator.channel()
    assert channel.store is None
    assert channel.gather("k", b"mine", 0) == [b"mine"]
    assert connect_ranks(5).run_id != coordinator.run_id


def test_a_group_without_torch_distributed_is_refused() -> None:
    with pytest.raises(ConfigError, match="not initialised"):
        connect_ranks(5, object())


@pytest.fixture
def initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)


def test_a_group_that_this_rank_is_not_in_is_refused(initialised: None) -> None:
    with pytest.raises(ConfigError, match="process_group is -100 on global rank 3"):
        connect_ranks(5, dist.GroupMember.NON_GROUP_MEMBER)


def test_rank_0_that_makes_none_is_named() -> None:
    with pytest.raises(LateRanksError, match="rank 0 did not make its Checkpointer within 5 s, but rank 2"):
        connect._find_rank_0(2, ImpatientStore(), 5)


def test_a_rank_0_that_is_slow_to_open_its_store_is_waited_for() -> None:
    class Slow(ImpatientStore):
        def wait(self, keys: list[str], timeout: timedelta, /) -> None:
            if self.now >= 5:  # the resolver has answered by then
                self.set(ADDRESS, b'["host",1,"run"]')
            super().wait(keys, timeout)

    board = Slow()
    board.set(connect.OPENING, b"1")
    assert connect._find_rank_0(1, board, 5, answers=lambda address: True, clock=board.clock).run_id == "run"
    board = ImpatientStore()
    board.set(connect.OPENING, b"1")
    with pytest.raises(LateRanksError, match="rank 0 did not make its Checkpointer"):
        connect._find_rank_0(1, board, 5, clock=board.clock)
    assert board.now == 5 + connect.ANSWER_SECS


def test_a_lost_store_of_the_group_is_not_a_rank_that_stays_away() -> None:
    with pytest.raises(CoordinationError, match="lost the process group's store") as caught:
        connect._find_rank_0(2, BrokenStore(), 5)
    assert not isinstance(caught.value, LateRanksError)


def test_the_address_of_a_dead_predecessor_is_passed_over() -> None:
    board = MemoryStore()
    board.set(ADDRESS, b'["host",1,"dead"]')
    slept: list[float] = []

    def sleep(secs: float) -> None:
        slept.append(secs)
        board.set(ADDRESS, b'["host",2,"alive"]')

    found = connect._find_rank_0(1, board, 30, answers=lambda address: address.run_id == "alive", sleep=sleep)
    assert (found.port, len(slept)) == (2, 1)
    assert board.check([connect._coming("alive", 1)]), "rank 0 hears that it is on its way"


def test_a_dead_predecessor_alone_is_no_rank_0() -> None:
    board = ImpatientStore()
    board.set(ADDRESS, b'["host",1,"dead"]')

    def sleep(secs: float) -> None:
        board.now += secs

    with pytest.raises(LateRanksError, match="rank 0 did not make its Checkpointer within 5 s"):
        connect._find_rank_0(1, board, 5, answers=lambda address: False, clock=board.clock, sleep=sleep)
    assert 5 <= board.now < 5.2


def test_which_stores_answer() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set(connect.RUN, "this")
    assert Address("127.0.0.1", server.port, "this").answers()
    assert not Address("127.0.0.1", server.port, "another").answers()
    port = server.port
    del server
    assert not Address("127.0.0.1", port, "this").answers()


def test_ranks_that_make_none_are_named_to_those_that_do() -> None:
    store = ImpatientStore()
    board = MemoryStore()
    board.set(ADDRESS, b"here")
    Channel(2, 4, store).gather("start/came", b"1", 0)
    Channel(2, 4, store).gather("start/all/seen", b"1", 0)
    with pytest.raises(LateRanksError, match="rank 1 and rank 3 did not make a Checkpointer within 5 s"):
        connect._all_arrive(Channel(0, 4, store, store.clock), board, 5, "run")
    assert board.values == {}, "whoever comes now must not find the address"
    assert store.now == 5, "nobody waits for them once more"
    with pytest.raises(LateRanksError, match="rank 1 and rank 3"):
        connect._all_arrive(Channel(2, 4, store, store.clock), board, 5, "run")


@pytest.mark.parametrize("away", [False, True])
def test_a_rank_that_is_slow_to_connect_is_waited_for_unless_another_stays_away(away: bool) -> None:
    class Slow(ImpatientStore):
        def wait(self, keys: list[str], timeout: timedelta, /) -> None:
            if self.now >= 2:  # the resolver has answered by then
                self.set("start/came/1", b"1")
            super().wait(keys, timeout)

    store, board = Slow(), MemoryStore()
    board.set(connect._coming("run", 1), b"1")
    if not away:
        board.set(connect._coming("run", 2), b"1")
        store.set("start/came/2", b"1")
        connect._all_arrive(Channel(0, 3, store, store.clock), board, 2, "run")
        assert not [key for key in store.values if key.startswith("start/came")], "it was waited for"
    else:
        with pytest.raises(LateRanksError, match=r"^rank 2 did not make a Checkpointer within 2 s"):
            connect._all_arrive(Channel(0, 3, store, store.clock), board, 2, "run")
    assert board.values == {}


def test_the_address_is_gone_before_anybody_goes_on() -> None:
    board = MemoryStore()
    board.set(ADDRESS, b"here")

    def work(channel: Channel) -> bool:
        connect._all_arrive(channel, board, 30, "run")
        return board.check([ADDRESS])

    assert on_ranks(3, work) == [False] * 3


@pytest.mark.parametrize(
    ("rank", "environment", "host"),
    [
        (0, {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "node-7"}, "127.0.0.1"),
        (2, {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "node-7"}, "127.0.0.1"),
        (0, {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "MASTER_ADDR": "node-7"}, "node-7"),
        (0, {"MASTER_ADDR": "node-7"}, "node-7"),
        (2, {"MASTER_ADDR": "node-7", "GROUP_RANK": "0"}, "node-7"),
        (4, {"MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "1"}, "127.0.0.1"),
        (4, {"MASTER_ADDR": "no such host", "GROUP_RANK": "1"}, "the.full.name"),
        (0, {}, "the.full.name"),
    ],
)
def test_the_address_is_one_that_other_nodes_reach(
    rank: int, environment: dict[str, str], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "the.full.name")
    assert reachable_host(rank, environment) == host
