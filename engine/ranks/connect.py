"""Connects the ranks of one Checkpointer, by way of their process group's store.

No collective: one that only some ranks enter hangs for the group's own timeout, or pairs with training's next
collective. Rank 0 puts the address of Holdfast's own store on the group's store (the "board"), waits until
every rank has arrived, and deletes it before any rank continues. So the next Checkpointer finds nothing
stale, and no counters are needed.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from engine.errors import ConfigError, CoordinationError, LateRanksError
from engine.format.json import canonical_bytes, parse_canonical
from engine.ranks.agreement import VERDICT_GRACE_SECS, rank0_decides
from engine.ranks.coordination import Channel, Coordinator
from engine.ranks.store_client import ANSWER_SECS, AnsweringStore, Store

ADDRESS = "holdfast/address"
OPENING = "holdfast/opening"
"""On the board while rank 0 opens its store: it has arrived, and its address follows."""
RUN = "run"
CHANNELS = 2
"""A Checkpointer opens two: the training thread's and the background thread's."""

_ALL_MAKE_ONE = (
    "every rank of the process group must make its Checkpointer at the same point. If only some ranks need "
    "one, give it their process_group"
)


def connect_ranks(timeout_secs: float, group: object = None) -> Coordinator:
    """Connect to the other ranks of `group`, by default to all ranks; connect to none if there is only one.

    Every rank of the group calls it at the same point.
    Raises: LateRanksError, on every rank that arrived, naming one that did not; ConfigError for a group that
        this rank is not in.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ConfigError("process_group was given, but torch.distributed is not initialised")
        return _alone()
    members = dist.group.WORLD if group is None else group
    if not isinstance(members, dist.ProcessGroup):
        raise ConfigError(
            f"process_group is {group!r} on global rank {dist.get_rank()}: it must be a ProcessGroup that "
            "this rank is in, from dist.new_group or mesh.get_group(). Other ranks make no Checkpointer"
        )
    if members.size() == 1:
        return _alone()
    store: Any = members.get_group_store()
    board = AnsweringStore(store)
    coordinator = _join(members.rank(), members.size(), board, timeout_secs)
    # Before the rank counts as arrived: opening them may take longer than ranks wait for each other.
    channels = [coordinator.channel() for _ in range(CHANNELS)]
    _all_arrive(channels[0], board, timeout_secs, coordinator.run_id)
    coordinator.opened.extend(channels)
    return coordinator


def _alone() -> Coordinator:
    return Coordinator(0, 1, uuid.uuid4().hex[:12])


@dataclass(frozen=True, slots=True)
class Address:
    """Where rank 0 hosts the store of one Checkpointer."""

    host: str
    port: int
    run_id: str

    def connect(self, timeout_secs: float) -> Store:
        """A client of the store. Raises: torch's error if the store is unreachable."""
        timeout = timedelta(seconds=timeout_secs)
        store: Any = TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=timeout)
        return AnsweringStore(store)

    def answers(self) -> bool:
        """Whether the store answers and is this one: a dead process may have left its address behind."""
        try:
            # First a plain socket: torch's client retries until its timeout.
            socket.create_connection((self.host, self.port), ANSWER_SECS).close()
            return self.connect(ANSWER_SECS).get(RUN) == self.run_id.encode()
        except (OSError, dist.DistError, RuntimeError):
            return False


def _join(rank: int, world_size: int, board: Store, timeout_secs: float) -> Coordinator:
    server: Any = None
    if rank == 0:
        board.set(OPENING, b"1")
        run_id, timeout = uuid.uuid4().hex[:12], timedelta(seconds=max(timeout_secs, ANSWER_SECS))
        server = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        server.set(RUN, run_id)
        host = reachable_host(dist.get_rank(), os.environ)
        board.set(ADDRESS, canonical_bytes([host, server.port, run_id]))
        address = Address("127.0.0.1", server.port, run_id)
    else:
        address = _find_rank_0(rank, board, timeout_secs)

    def connect() -> Store:
        try:
            # Not less: torch resolves the peer's name, which takes 5 s if one answer is lost.
            return address.connect(max(timeout_secs, ANSWER_SECS))
        except (dist.DistError, RuntimeError) as error:
            raise CoordinationError(
                f"rank {rank} cannot reach rank 0 at {address.host}:{address.port}: {error}"
            ) from error

    return Coordinator(rank, world_size, address.run_id, connect, server)


def _find_rank_0(
    rank: int,
    board: Store,
    timeout_secs: float,
    *,
    answers: Callable[[Address], bool] = Address.answers,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Address:
    deadline = clock() + timeout_secs
    patient = False
    while True:
        try:
            board.wait([ADDRESS], timedelta(seconds=max(0.001, deadline - clock())))
            address = Address(*parse_canonical(board.get(ADDRESS), what="rank 0's address"))
        except (dist.DistError, RuntimeError) as error:
            # A FileStore reports its timeout with a plain RuntimeError.
            if not isinstance(error, dist.DistStoreError) and "timeout" not in str(error):
                raise CoordinationError(f"rank {rank} lost the process group's store: {error}") from error
            if not patient and board.check([OPENING]):
                deadline, patient = deadline + ANSWER_SECS, True
                continue
            raise _rank_0_missing(rank, timeout_secs) from error
        board.set(_coming(address.run_id, rank), b"1")
        if answers(address):
            return address
        # torchrun may keep one store through restarts: the address is that of a dead rank 0.
        if clock() >= deadline:
            raise _rank_0_missing(rank, timeout_secs)
        sleep(0.1)


def _rank_0_missing(rank: int, timeout_secs: float) -> LateRanksError:
    return LateRanksError(
        f"rank 0 did not make its Checkpointer within {timeout_secs:g} s, but rank {rank} did: "
        f"{_ALL_MAKE_ONE}",
        (0,),
    )


def _coming(run_id: str, rank: int) -> str:
    """Key on the board that says a rank has read the address and is connecting."""
    return f"holdfast/coming/{run_id}/{rank}"


def _all_arrive(channel: Channel, board: Store, timeout_secs: float, run_id: str) -> None:
    """Return when every rank has arrived and the address is deleted from the board."""
    if channel.rank != 0:
        channel.gather("start/came", b"1", 0)

    def meet() -> bool:
        try:
            try:
                channel.gather("start/came", b"1", timeout_secs)
            except LateRanksError as late:
                away = tuple(rank for rank in late.ranks if not board.check([_coming(run_id, rank)]))
                if away:
                    raise LateRanksError(str(late), away) from None
                channel.gather("start/came", b"1", ANSWER_SECS)  # all of them are connecting
        except LateRanksError as late:
            names = " and ".join(f"rank {rank}" for rank in late.ranks)
            raise LateRanksError(
                f"{names} did not make a Checkpointer within {timeout_secs:g} s: {_ALL_MAKE_ONE}", late.ranks
            ) from None
        finally:
            for key in (ADDRESS, OPENING, *(_coming(run_id, rank) for rank in range(1, channel.world_size))):
                board.delete_key(key)
        return True

    rank0_decides(channel, "start/all", meet, timeout_secs + ANSWER_SECS + VERDICT_GRACE_SECS)


def reachable_host(global_rank: int, environment: Mapping[str, str]) -> str:
    """A host name or address at which the other ranks can reach this host."""
    if environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE", ""):
        return "127.0.0.1"
    master = environment.get("MASTER_ADDR")
    if master is None:
        return socket.getfqdn()
    # Under torchrun MASTER_ADDR is the host of global rank 0, under a name that all nodes resolve.
    if global_rank == 0 or environment.get("GROUP_RANK") == "0":
        return master
    # The group's first rank is on another node: use the address from which this node reaches MASTER_ADDR.
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return socket.getfqdn()
