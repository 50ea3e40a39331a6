"""A store whose server is frozen blocks no rank forever."""

from __future__ import annotations

import gc
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine.errors import CoordinationError, LateRanksError
from engine.ranks import store_client
from engine.ranks.coordination import Channel
from engine.ranks.store_client import AnsweringStore
from tests.support.channels import BrokenStore, MemoryStore

DEADLINE_SECS = 60.0


class Frozen(MemoryStore):
    """Answers nothing before `thawed`; as torch's client it then even says that a wait was given up."""

    def __init__(self) -> None:
        super().__init__()
        self.thawed = threading.Event()
        self.asked: list[str] = []

    def _freeze(self, name: str) -> None:
        self.asked.append(name)
        assert self.thawed.wait(DEADLINE_SECS)

    def set(self, key: str, value: bytes, /) -> None:
        self._freeze("set")
        super().set(key, value)

    def get(self, key: str, /) -> bytes:
        self._freeze("get")
        return super().get(key)

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        self._freeze("wait")
        super().wait(keys, timeout)

    def delete_key(self, key: str, /) -> bool:
        self._freeze("delete_key")
        return super().delete_key(key)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_client, "ANSWER_SECS", 0.01)


def test_what_is_answered_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_client, "ANSWER_SECS", DEADLINE_SECS)
    store = AnsweringStore(MemoryStore())
    store.set("k", b"value")
    store.wait(["k"], timedelta(seconds=1))
    assert store.get("k") == b"value"
    assert store.check(["k"])
    assert store.delete_key("k")
    assert not store.delete_key("k")
    with pytest.raises(dist.DistStoreError, match="not set in time"):
        store.wait(["k"], timedelta(seconds=0))
    with pytest.raises(KeyError):
        store.get("k")
    with pytest.raises(dist.DistNetworkError, match="reset by peer"):
        AnsweringStore(BrokenStore()).set("k", b"")


def test_a_frozen_rank_0_is_late_and_named() -> None:
    frozen = Frozen()
    channel = Channel(1, 2, AnsweringStore(frozen))
    with pytest.raises(LateRanksError, match=r"rank 0 did not answer within 0\.1 s"):
        channel.broadcast("k", None, 0.1)
    frozen.thawed.set()


def test_to_tell_a_frozen_rank_0_something_fails_too() -> None:
    frozen = Frozen()
    channel = Channel(1, 2, AnsweringStore(frozen))
    with pytest.raises(CoordinationError, match=r"rank 1 lost its connection to rank 0.*did not answer"):
        channel.gather("k", b"here", 0)
    with pytest.raises(CoordinationError):
        channel.forget(["k"])
    frozen.thawed.set()


def test_what_was_given_up_before_it_began_is_never_done(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = Frozen()
    store = AnsweringStore(frozen)
    for _ in range(2):
        with pytest.raises(dist.DistNetworkError):
            store.set("k", b"late")
    frozen.thawed.set()
    monkeypatch.setattr(store_client, "ANSWER_SECS", DEADLINE_SECS)
    store.set("other", b"now")
    assert frozen.asked == ["set", "set"], "the first, which was under way, and the last"
    assert frozen.values == {"k": b"late", "other": b"now"}


def test_its_thread_ends_with_it() -> None:
    before = {thread.ident for thread in threading.enumerate()}
    store = AnsweringStore(MemoryStore())
    (thread,) = [thread for thread in threading.enumerate() if thread.ident not in before]
    del store
    gc.collect()
    thread.join(DEADLINE_SECS)
    assert not thread.is_alive()
