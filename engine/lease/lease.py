"""One run at a time writes to a checkpoint directory: the lease.

The lease is a file `lease-<epoch>`, created exclusively. Its holder increments a heartbeat in it. The highest
epoch holds the directory. A takeover creates the next epoch: of several runs that try, one wins. A holder
that was only suspended finds the higher epoch before its next commit, and stops.

Within one boot and pid namespace, pid and start time show at once whether the holder is alive. Anywhere else
it counts as dead when its heartbeat has not changed for 60 s on the observer's own clock. Clocks of different
machines are never compared, except for the age in a message.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType

from engine.errors import (
    AlreadyExistsError,
    DamagedError,
    DirectoryHeldError,
    HoldfastError,
    LeaseLostError,
    NotFoundError,
    StorageError,
    StorageUnavailableError,
)
from engine.forks import Home
from engine.format.names import lease_name, parse_lease
from engine.lease.arrivals import Arrivals
from engine.lease.call_site import calling_line
from engine.lease.fencing import fence
from engine.lease.lease_file import MAX_LEASE_BYTES, LeaseInfo, Verdict, judge
from engine.lease.process import ProcessIdentity, is_alive
from engine.storage.base import Heads, Storage

log = logging.getLogger(__name__)

STALE_SECS = 60.0
"""A holder whose heartbeat has not changed for this long, by the observer's clock, is dead."""

HEARTBEAT_SECS = 10.0
"""Interval between two heartbeats of the holder."""

RELEASE_SECS = 60.0
"""How long a run that ends waits for its storage to write the release: then the lease is stale anyway."""

_ours: weakref.WeakValueDictionary[tuple[str, int], Lease] = weakref.WeakValueDictionary()
"""The leases that this process has acquired, by run and epoch."""


class Lease:
    """The right to write to a directory. Made by `acquire`; one process holds it for all ranks of a run.

    Thread-safe. A context manager: it is released at the end. A forked child does not hold it: there `check`
    raises, and nothing is written.
    """

    def __init__(
        self, storage: Storage, info: LeaseInfo, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self._storage = storage
        self._info = info
        self._clock = clock
        self._wall = wall
        self._acquired_at = clock()
        self._home = Home()
        self._made_at = calling_line()
        _ours[info.run_id, info.epoch] = self
        self._lock = threading.Lock()  # a late heartbeat must not overwrite the release
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._releasing = False
        self._problem: Exception | None = None
        self._lost = False
        self.arrivals = Arrivals(clock)
        """What is known of attempts that no known run began."""
        self.predecessors: frozenset[str] = frozenset()
        """Ids of runs that held the directory before and ended without releasing it."""
        self._heads: Heads | None = None

    @classmethod
    def acquire(
        cls,
        storage: Storage,
        *,
        run_id: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        process: ProcessIdentity | None = None,
        stale_secs: float = STALE_SECS,
        poll_secs: float = 1.0,
        wall: Callable[[], float] = time.time,
        alive: Callable[[ProcessIdentity], bool | None] = is_alive,
    ) -> Lease:
        """Become the only writer; take over from a dead holder. Waits up to `stale_secs` to see it dead.

        Attempts that earlier holders were writing are then renamed to dead-*, where the storage can rename:
        they can no longer commit them. DirectoryHeldError if a live run holds the directory.
        """
        me = process or ProcessIdentity.current()
        watch = _Watch(storage, clock)
        while True:
            top = watch.look()
            if top is not None:
                verdict = judge(top, me, alive, watch.unchanged_secs, watch.has_changed, stale_secs)
                if verdict is Verdict.LIVE:
                    raise DirectoryHeldError(_held_message(storage, top, me, watch, wall()))
                if verdict is Verdict.UNKNOWN:
                    watch.announce(top, stale_secs)
                    sleep(poll_secs)
                    continue
            epoch = top.epoch + 1 if top is not None else 1
            info = LeaseInfo(epoch, me, run_id, heartbeat=0, heartbeat_at=wall(), released=False)
            if _create(storage, info, sleep, poll_secs):
                lease = cls(storage, info, clock, wall)
                try:
                    if _overtaken(storage, info):
                        continue
                    if top is not None and not top.released:
                        log.info("took over %s from %s, which has ended", storage.uri, top.describe())
                    fenced = fence(storage, epoch)
                    lease.predecessors, lease._heads = fenced.predecessors, fenced.heads
                except HoldfastError:
                    lease.try_release()
                    raise
                return lease

    def take_heads(self) -> Heads | None:
        """The listing made when this lease was acquired. Only once: it ages, and can be large."""
        heads, self._heads = self._heads, None
        return heads

    @property
    def epoch(self) -> int:
        """The number of this lease: higher than that of every earlier one."""
        return self._info.epoch

    @property
    def info(self) -> LeaseInfo:
        """The contents of the lease file."""
        return self._info

    @property
    def held_secs(self) -> float:
        """How long this lease has been held, by its own clock."""
        return self._clock() - self._acquired_at

    def heartbeat(self) -> None:
        """Write the next heartbeat. LeaseLostError if the lease is lost; StorageError if the write fails."""
        self.check()
        with self._lock:
            if not self._info.released:
                self._write(self._info.next_heartbeat(self._wall()))

    def check(self) -> None:
        """LeaseLostError if another run has taken over the directory. Call it right before a commit."""
        if self._home.left:
            raise LeaseLostError(
                f"{self._storage.uri} is held by process {self._home.pid}, and this is a forked child of it: "
                "only the parent may write there"
            )
        if not self._lost:
            successor = self._find_successor()
            if successor is None:
                return
            self._lost = True
            log.error("the lease on %s was lost to %s", self._storage.uri, successor)
        raise LeaseLostError(
            f"another run has taken over {self._storage.uri}, because this one (lease {self.epoch}) showed "
            "no heartbeat: it can no longer commit there. Stop one of the two, or give this one another "
            "--checkpoint_dir"
        )

    def start_heartbeat(self, interval_secs: float = HEARTBEAT_SECS) -> None:
        """Write heartbeats from a background thread until `release`. A failed one is logged and retried."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._beat, args=(interval_secs,), name="holdfast-lease", daemon=True
            )
            self._thread.start()

    def release(self) -> None:
        """Stop the heartbeat and let the next run start at once. A lost lease is left to its new holder.

        Raises: StorageError; StorageUnavailableError also if the storage does not answer at all.
        """
        if self._home.left:
            return
        thread = self._thread
        if thread is None:
            self._write_release()
            return
        # The heartbeat thread also writes the release: a call that never returns blocks only that thread.
        self._releasing = True
        self._stop.set()
        thread.join(RELEASE_SECS)
        if thread.is_alive():
            raise StorageUnavailableError(
                f"{self._storage.uri} does not answer: the lease was not released within "
                f"{RELEASE_SECS:g} s. The next run must wait {STALE_SECS:g} s, until the lease is stale"
            )
        if self._problem is not None:
            raise self._problem

    def abandon(self) -> None:
        """Stop the heartbeat without releasing: the next run takes over as from a dead holder."""
        self._stop.set()

    def try_release(self) -> None:
        """Release, but only log a failure: for a start that failed with an error of its own to report."""
        try:
            self.release()
        except HoldfastError as error:
            log.warning("could not release the lease on %s: %s", self._storage.uri, error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _write(self, info: LeaseInfo) -> None:
        self._storage.publish(lease_name(info.epoch), info.to_bytes(), exclusive=False)
        self._info = info

    def _beat(self, interval_secs: float) -> None:
        while not self._stop.wait(interval_secs):
            try:
                self.heartbeat()
            except LeaseLostError:
                return  # logged; the next commit raises it
            except HoldfastError as error:  # any: a garbled answer may raise something besides StorageError
                log.warning("a heartbeat in %s failed, the next may succeed: %s", self._storage.uri, error)
        if self._releasing:
            try:
                self._write_release()
            except Exception as error:
                self._problem = error

    def _write_release(self) -> None:
        try:
            self.check()
        except (LeaseLostError, NotFoundError):  # taken over, or the whole directory was deleted
            return
        with self._lock:
            if not self._info.released:
                self._write(self._info.as_released())

    def _find_successor(self) -> str | None:
        """Who holds the directory instead of us. Also checks by name: network file systems cache listings."""
        higher = [epoch for epoch in _epochs(self._storage) if epoch > self.epoch]
        if higher or self._storage.exists(lease_name(self.epoch + 1)):
            return f"the holder of lease {max(higher, default=self.epoch + 1)}"
        own = _read(self._storage, self.epoch)
        if own is not None and not own.same_holder(self._info):
            return own.describe()  # the directory was emptied, and another run started at epoch 1 again
        return None


class _Watch:
    """Watches the newest lease: how long, on our own clock, its contents have not changed."""

    def __init__(self, storage: Storage, clock: Callable[[], float]) -> None:
        self._storage = storage
        self._clock = clock
        self._seen: LeaseInfo | None = None
        self._since = clock()
        self._announced = False
        self.has_changed = False

    @property
    def unchanged_secs(self) -> float:
        return self._clock() - self._since

    def look(self) -> LeaseInfo | None:
        """The newest lease, or None."""
        top = None
        for epoch in sorted(_epochs(self._storage), reverse=True):
            top = _read(self._storage, epoch)
            if top is not None:
                break
        if top != self._seen:
            self.has_changed = self._seen is not None and top is not None and top.epoch == self._seen.epoch
            self._seen, self._since = top, self._clock()
        return top

    def announce(self, top: LeaseInfo, stale_secs: float) -> None:
        if not self._announced:
            self._announced = True
            log.info(
                "%s was last held by %s: waiting up to %.0f s for a heartbeat",
                self._storage.uri,
                top.describe(),
                stale_secs,
            )


def _epochs(storage: Storage) -> list[int]:
    found = (parse_lease(entry.name) for entry in storage.list_dir() if not entry.is_dir)
    return [epoch for epoch in found if epoch is not None]


def _read(storage: Storage, epoch: int) -> LeaseInfo | None:
    """A lease, or None if it was deleted. An unreadable one counts as held until it is stale."""
    name = lease_name(epoch)
    try:
        raw = storage.read_bytes(name, max_bytes=MAX_LEASE_BYTES)
        return LeaseInfo.from_bytes(raw, epoch, what=storage.describe(name))
    except NotFoundError:
        return None
    except DamagedError:
        return LeaseInfo.unreadable(epoch)


def _create(storage: Storage, info: LeaseInfo, sleep: Callable[[float], None], settle_secs: float) -> bool:
    """Create the lease file. False if another run was faster."""
    try:
        storage.publish(lease_name(info.epoch), info.to_bytes(), exclusive=True)
    except StorageError as error:
        # The file may exist all the same: the answer was lost, or is that of a repeated request.
        if not _is_ours(storage, info, error):
            if isinstance(error, AlreadyExistsError):
                return False
            # The holder of a later lease deletes the temporary files of earlier ones.
            if isinstance(error, NotFoundError) and _higher(storage, info.epoch):
                return False
            raise
        return True
    if storage.supports_exclusive_create:
        return True
    # If several runs overwrote each other, the last write wins: wait for the others' writes, then look.
    sleep(settle_secs)
    written = _read(storage, info.epoch)
    return written is not None and written.same_holder(info)


def _overtaken(storage: Storage, info: LeaseInfo) -> bool:
    """Whether a higher lease exists already: then ours, just created, is deleted again.

    `look` lists the leases and then reads them. While other runs take over from each other, the listed ones
    may be deleted before they are read, so that it sees none: a run that then began at 1 would fence a live
    holder.
    """
    if not _higher(storage, info.epoch):
        return False
    with contextlib.suppress(StorageError):
        storage.delete_file(lease_name(info.epoch))
    return True


def _higher(storage: Storage, epoch: int) -> bool:
    return any(found > epoch for found in _epochs(storage))


def _is_ours(storage: Storage, info: LeaseInfo, error: StorageError) -> bool:
    """Whether the lease exists and is this one. False if it cannot be read: then `error` is raised."""
    try:
        found = _read(storage, info.epoch)
    except StorageError:
        return False
    return found is not None and found == info


def _held_message(storage: Storage, top: LeaseInfo, me: ProcessIdentity, watch: _Watch, wall: float) -> str:
    if top.process == me:
        ours = _ours.get((top.run_id, top.epoch))
        made = f", in a Checkpointer made at {ours._made_at}" if ours is not None and ours._made_at else ""
        return (
            f"{storage.uri} is held by this process itself (pid {me.pid} on {me.host}, run {top.run_id})"
            f"{made}: close that Checkpointer first (deleting the last reference to it does so), or use "
            "another directory"
        )
    age_secs = wall - top.heartbeat_at if me.shares_pids_with(top.process) else watch.unchanged_secs
    return (
        f"{storage.uri} is held by {top.describe()}, last heartbeat {max(0.0, age_secs):.0f} s ago: "
        "give this run another --checkpoint_dir, or stop that process first"
    )
