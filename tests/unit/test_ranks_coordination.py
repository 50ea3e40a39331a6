"""Channels between ranks: every payload arrives, late ranks are named, nothing is left in the store."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from engine.errors import CoordinationError, LateRanksError
from engine.ranks import coordination
from engine.ranks.coordination import Channel, Coordinator
from tests.support.channels import BrokenStore, ImpatientStore, MemoryStore, on_ranks


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_gather_brings_every_ranks_payload_to_rank_0_in_order(world_size: int) -> None:
    results = on_ranks(world_size, lambda channel: channel.gather("k", b"%d" % channel.rank, 30))
    assert results[0] == [b"%d" % rank for rank in range(world_size)]
    assert results[1:] == [None] * (world_size - 1)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_broadcast_hands_rank_0s_payload_to_all(world_size: int) -> None:
    def work(channel: Channel) -> bytes:
        return channel.broadcast("k", b"word" if channel.rank == 0 else None, 30)

    assert on_ranks(world_size, work) == [b"word"] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_scatter_hands_each_rank_its_own(world_size: int) -> None:
    def work(channel: Channel) -> bytes:
        payloads = [b"for %d" % rank for rank in range(world_size)]
        return channel.scatter("k", payloads if channel.rank == 0 else None, 30)

    assert on_ranks(world_size, work) == [b"for %d" % rank for rank in range(world_size)]


def test_payloads_may_be_empty_or_large() -> None:
    for payload in (b"", b"x" * 3_000_000):
        assert on_ranks(2, lambda channel, p=payload: channel.gather("k", p, 30))[0] == [payload] * 2


class NarrowStore(MemoryStore):
    """Hangs up on values that are too long, as torch's does above 8 MiB."""

    def set(self, key: str, value: bytes, /) -> None:
        if len(value) > 20:
            raise dist.DistNetworkError("connection reset by peer")
        super().set(key, value)


@pytest.mark.parametrize("payload", [b"x" * 20, b"x" * 21, b"long " * 30, coordination._IN_PIECES])
def test_a_payload_that_no_value_holds_goes_in_pieces(
    payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordination, "PIECE_BYTES", 20)
    store = NarrowStore()

    def work(channel: Channel) -> Any:
        first = channel.rank == 0
        found = [
            channel.gather("a", payload, 30),
            channel.scatter("b", [payload] * 3 if first else None, 30),
            channel.broadcast("c", payload if first else None, 30),
        ]
        if channel.gather("read", b"", 30) is not None:
            channel.forget(["c"])
        return found

    results = on_ranks(3, work, store)
    assert results == [[[payload] * 3 if rank == 0 else None, payload, payload] for rank in range(3)]
    assert store.values == {}, "the pieces are forgotten with their key"


def test_an_exchange_leaves_nothing_in_the_store() -> None:
    store = MemoryStore()

    def work(channel: Channel) -> None:
        channel.gather("a", b"1", 30)
        channel.scatter("b", [b"1"] * 3 if channel.rank == 0 else None, 30)
        channel.broadcast("c", b"1" if channel.rank == 0 else None, 30)
        if channel.gather("d", b"", 30) is not None:
            channel.forget(["c"])

    on_ranks(3, work, store)
    assert store.values == {}


def test_forgetting_what_is_not_there_is_fine() -> None:
    Channel(0, 2, MemoryStore()).forget(["never set"])
    Channel(0, 1, None).forget(["never set"])


@pytest.mark.parametrize(
    ("present", "named"),
    [
        ((), "ranks 1, 2, 3 did not report within 7 s"),
        ((1, 3), "rank 2 did not report within 7 s"),
        ((2,), "ranks 1, 3 did not report within 7 s"),
        ((1, 2), "rank 3 did not report within 7 s"),
    ],
)
def test_gather_names_every_late_rank_and_no_other(present: tuple[int, ...], named: str) -> None:
    store = ImpatientStore()
    for rank in present:
        Channel(rank, 4, store).gather("save/1/receipt", b"here", 0)
    with pytest.raises(LateRanksError, match=named) as caught:
        Channel(0, 4, store, store.clock).gather("save/1/receipt", b"", 7)
    assert "save/1/receipt" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)


def test_the_deadline_is_one_for_all_ranks_together() -> None:
    """Not one after the other: three ranks that are late cost one time-out."""
    store = ImpatientStore()
    with pytest.raises(LateRanksError):
        Channel(0, 4, store, store.clock).gather("k", b"", 7)
    assert sum(store.waits) == 7

    class Slow(ImpatientStore):
        def wait(self, keys: list[str], timeout: Any, /) -> None:
            self.waits.append(timeout.total_seconds())
            self.now += 3

    slow = Slow()
    for rank in (1, 2, 3):
        slow.set(f"k/{rank}", b"")
    Channel(0, 4, slow, slow.clock).gather("k", b"", 7)
    assert slow.waits[:2] == [7, 4]
    assert 0 < slow.waits[2] <= 1, "the last one is still asked for"


def test_a_rank_that_reports_at_the_last_moment_is_not_late() -> None:
    """Between the time-out and the look for who is late."""

    class Late(ImpatientStore):
        def wait(self, keys: list[str], timeout: Any, /) -> None:
            try:
                super().wait(keys, timeout)
            finally:
                self.values.setdefault("k/1", b"just in time")

    store = Late()
    assert Channel(0, 2, store, store.clock).gather("k", b"", 7) == [b"", b"just in time"]


@pytest.mark.parametrize("call", ["broadcast", "scatter"])
def test_a_rank_0_that_does_not_answer_is_named(call: str) -> None:
    with pytest.raises(LateRanksError, match="rank 0 did not answer within 9 s"):
        getattr(Channel(2, 3, ImpatientStore()), call)("k", None, 9)


@pytest.mark.parametrize(
    "call",
    [
        lambda channel: channel.gather("k", b"", 1),
        lambda channel: channel.broadcast("k", None, 1),
        lambda channel: channel.scatter("k", None, 1),
        lambda channel: channel.forget(["k"]),
    ],
    ids=["gather", "broadcast", "scatter", "forget"],
)
def test_a_lost_connection_is_not_a_late_rank(call: Any) -> None:
    with pytest.raises(CoordinationError, match="rank 1 lost its connection to rank 0") as caught:
        call(Channel(1, 2, BrokenStore()))
    assert not isinstance(caught.value, LateRanksError)


def test_a_lost_connection_at_rank_0() -> None:
    for call in (
        lambda channel: channel.gather("k", b"", 1),
        lambda channel: channel.broadcast("k", b"", 1),
        lambda channel: channel.scatter("k", [b"", b""], 1),
    ):
        with pytest.raises(CoordinationError):
            call(Channel(0, 2, BrokenStore()))


def test_each_channel_is_a_connection_of_its_own() -> None:
    """A wait in one thread blocks every other call on the same client."""
    stores: list[MemoryStore] = []

    def connect() -> MemoryStore:
        stores.append(MemoryStore())
        return stores[-1]

    coordinator = Coordinator(0, 2, "run", connect)
    assert coordinator.channel().store is not coordinator.channel().store
    assert len(stores) == 2
    coordinator.opened.extend(Channel(0, 2, connect()) for _ in range(2))
    assert coordinator.channel().store is not coordinator.channel().store
    assert len(stores) == 4, "those that are open are given out first"


def test_the_real_store_behaves_like_the_one_of_these_tests() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    port = server.port

    def client() -> Any:
        return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

    zero, one = Channel(0, 2, client()), Channel(1, 2, client())
    one.gather("k", b"\x00payload\xff", 5)
    assert zero.gather("k", b"", 5) == [b"", b"\x00payload\xff"]
    zero.scatter("s", [b"", b"yours"], 5)
    assert one.scatter("s", None, 5) == b"yours"
    long = b"x" * (9 << 20)  # torch hangs up on a value above 8 MiB
    zero.broadcast("long", long, 5)
    assert one.broadcast("long", None, 5) == long
    with pytest.raises(LateRanksError, match="rank 1"):
        zero.gather("again", b"", 0.01)
    with pytest.raises(LateRanksError, match="rank 0"):
        one.broadcast("again", None, 0.01)
    assert not server.check(["k/1"])
    del server
    with pytest.raises(CoordinationError, match="lost its connection"):
        one.broadcast("again", None, 5)
