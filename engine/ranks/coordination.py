"""Messages between ranks, without a collective on training's process groups.

A save must never touch a process group that training uses: a collective on a background thread would
interleave with training's own and deadlock. So ranks exchange messages over Holdfast's own TCPStore, which
rank 0 hosts. A blocking `wait` in one thread blocks every other call on the same client, so each thread has a
connection of its own, a `Channel`.

How ranks find the store: `engine.ranks.connect`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from engine.errors import CoordinationError, LateRanksError
from engine.ranks.store_client import Store

Clock = Callable[[], float]

PIECE_BYTES = 4 << 20
"""Longer payloads are split: torch's store disconnects on a value above 8 MiB, and a rank with 100,000 chunks
sends more than that."""

_IN_PIECES = b"\0pieces:"


@dataclass(slots=True)
class Channel:
    """One thread's connection to the other ranks. Not thread-safe: one per thread.

    Keys must be unique per exchange; `forget` deletes keys that no rank will read again.
    """

    rank: int
    world_size: int
    store: Store | None
    clock: Clock = time.monotonic
    _pieces: dict[str, int] = field(default_factory=dict)
    """Number of extra keys per split payload, for keys that this channel has set or read."""

    def gather(
        self, key: str, payload: bytes, timeout_secs: float, *, what: str = "", without: Sequence[int] = ()
    ) -> list[bytes] | None:
        """Collect one payload of every rank on rank 0.

        Args:
            what: the call that it belongs to, for the message about late ranks.
            without: ranks not to wait for; the result leaves them out.
        Returns: on rank 0 the payloads by rank, elsewhere None.
        Raises: LateRanksError on rank 0, naming every rank that has not reported by the deadline;
            CoordinationError when the store is gone.
        """
        if self.store is None:
            return [payload]
        if self.rank != 0:
            self._set(f"{key}/{self.rank}", payload)
            return None
        deadline = self.clock() + timeout_secs
        keys = {rank: f"{key}/{rank}" for rank in range(1, self.world_size) if rank not in without}
        payloads = [payload]
        for rank, rank_key in keys.items():
            raw = self._get(rank_key, max(0.001, deadline - self.clock()))
            if raw is None:
                late = [r for r, its_key in keys.items() if r >= rank and not self._check(its_key)]
                # Empty if the last ranks reported between the timeout and this check.
                if late:
                    raise LateRanksError(_late_message(late, timeout_secs, key, what), tuple(late))
                raw = self._get(rank_key, 1.0)
                assert raw is not None, f"{rank_key} was there"
            payloads.append(raw)
        self.forget(keys.values())
        return payloads

    def broadcast(self, key: str, payload: bytes | None, timeout_secs: float) -> bytes:
        """Send rank 0's payload to every rank.

        Raises: LateRanksError naming rank 0 when it does not answer by the deadline;
            CoordinationError when the store is gone.
        """
        if self.rank == 0:
            assert payload is not None, "rank 0 must give the payload"
            if self.store is not None:
                self._set(key, payload)
            return payload
        raw = self._get(key, timeout_secs)
        if raw is None:
            raise LateRanksError(
                f"rank 0 did not answer within {round(timeout_secs, 1):g} s ({key}); "
                "look at its log for a slow disk, a hang or a crash"
            )
        return raw

    def scatter(self, key: str, payloads: Sequence[bytes] | None, timeout_secs: float) -> bytes:
        """Send each rank its own payload from rank 0's list. Raises as `broadcast`."""
        if self.rank == 0:
            assert payloads is not None
            assert len(payloads) == self.world_size, f"{len(payloads)} for {self.world_size} ranks"
            for rank in range(1, self.world_size):
                self._set(f"{key}/{rank}", payloads[rank])
            return payloads[0]
        raw = self.broadcast(f"{key}/{self.rank}", None, timeout_secs)
        self.forget([f"{key}/{self.rank}"])
        return raw

    def forget(self, keys: Iterable[str]) -> None:
        """Delete keys that no rank will read again, so that the store does not grow."""
        if self.store is None:
            return
        for key in keys:
            try:
                self.store.delete_key(key)
                for number in range(self._pieces.pop(key, 0)):
                    self.store.delete_key(_piece(key, number))
            except (dist.DistError, RuntimeError) as error:
                raise _gone(self.rank, error) from error

    def _set(self, key: str, payload: bytes) -> None:
        assert self.store is not None
        try:
            if len(payload) > PIECE_BYTES or payload.startswith(_IN_PIECES):
                starts = range(0, len(payload), PIECE_BYTES)
                for number, at in enumerate(starts):
                    self.store.set(_piece(key, number), payload[at : at + PIECE_BYTES])
                self._pieces[key] = len(starts)
                payload = _IN_PIECES + b"%d" % len(starts)
            self.store.set(key, payload)  # last: a reader that waited for it finds the pieces
        except (dist.DistError, RuntimeError) as error:
            raise _gone(self.rank, error) from error

    def _check(self, key: str) -> bool:
        assert self.store is not None
        try:
            return self.store.check([key])
        except (dist.DistError, RuntimeError) as error:
            raise _gone(self.rank, error) from error

    def _get(self, key: str, timeout_secs: float) -> bytes | None:
        """The key's value, or None if it was not set in time."""
        assert self.store is not None
        try:
            self.store.wait([key], timedelta(seconds=timeout_secs))
        except dist.DistStoreError:
            return None
        except (dist.DistError, RuntimeError) as error:
            raise _gone(self.rank, error) from error
        try:
            payload = self.store.get(key)
            if payload.startswith(_IN_PIECES):
                count = self._pieces[key] = int(payload.removeprefix(_IN_PIECES))
                payload = b"".join(self.store.get(_piece(key, number)) for number in range(count))
            return payload
        except (dist.DistError, RuntimeError) as error:
            raise _gone(self.rank, error) from error


@dataclass(slots=True)
class Coordinator:
    """This rank's number among the ranks, and its source of channels to them."""

    rank: int
    world_size: int
    run_id: str
    connect: Callable[[], Store | None] = field(default=lambda: None)
    # On rank 0 this object hosts the store: it must live as long as the coordinator.
    server: object | None = None
    opened: list[Channel] = field(default_factory=list)
    """Channels that are open but not yet in use."""

    def channel(self) -> Channel:
        """A connection for one thread."""
        if self.opened:
            return self.opened.pop()
        return Channel(self.rank, self.world_size, self.connect())


def _gone(rank: int, error: Exception) -> CoordinationError:
    return CoordinationError(
        f"rank {rank} lost its connection to rank 0, which has ended or is unreachable: {error}"
    )


def _late_message(ranks: Sequence[int], timeout_secs: float, key: str, what: str) -> str:
    look = "look at their logs for a slow disk, a hang or a crash"
    within = f"within {round(timeout_secs, 1):g} s"
    if not what:
        return f"{_ranks(ranks)} did not report {within} ({key}); {look}"
    return (
        f"{_ranks(ranks)} did not report {within} in {what}: the call was not made there or is unfinished. "
        f"All ranks must make the same calls; if they do, {look}"
    )


def _piece(key: str, number: int) -> str:
    return f"{key}/piece-{number}"


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
