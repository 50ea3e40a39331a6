"""The checkpoint directory of the run that writes to it: its lease, the order of checkpoints, the mirror."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.directory.clean_up import delete_expired, warn_no_best
from engine.directory.listing import Directory, Memory, committed, highest_sequence
from engine.directory.reaper import reap_abandoned
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention
from engine.errors import DirectoryHeldError, HoldfastError, NotFoundError, StorageError
from engine.format.best import DEFAULT
from engine.format.manifest import ShardReceipt, TensorInfo
from engine.format.names import PROBE_PREFIX, lease_name
from engine.lease.lease import STALE_SECS, Lease
from engine.mirror.uploader import Mirror, MirrorPlan, Patience
from engine.ranks.agreement import all_agree, rank0_decides
from engine.ranks.coordination import Channel
from engine.save.commit import SaveInfo, commit
from engine.save.events import Listener
from engine.save.unclosed import wait_for_unreferenced
from engine.storage.base import Storage

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RunDirectory:
    """The directory that a run writes to. Only rank 0 has its lease and its mirror.

    Args:
        run_id: names this run in the lease and in the probe.
        second: the storage of the mirror, if there is one.
        parent: id of the next checkpoint's predecessor.
    """

    storage: Storage
    second: Storage | None
    run_id: str
    retention: Retention | None
    listener: Listener
    parent: str | None = None
    lease: Lease | None = None
    mirror: Mirror | None = None
    failed_ids: set[str] = field(default_factory=set)
    """Ids that this run failed to commit. A late rank may still write into one."""
    _sequence: int = 0
    _seen: Memory = field(default_factory=dict)
    _listing: Directory | None = None

    def acquire(self, channel: Channel, mirror_freq: int, timeout_secs: float) -> None:
        """Rank 0 acquires the leases; then every rank checks that it sees the same directory.

        Raises: a rank's failure, on every rank; no lease is held then.
        """

        def acquire() -> dict[str, Any]:
            try:
                self._acquire(mirror_freq)
            except DirectoryHeldError:
                self._try_release()
                if not wait_for_unreferenced(timeout_secs):
                    raise
                self._acquire(mirror_freq)  # its holder may have been an unreferenced Checkpointer
            return {}

        try:
            # Rank 0 may need STALE_SECS to see whether another holder is alive.
            rank0_decides(channel, "start/lease", acquire, timeout_secs + STALE_SECS)
            problem: Exception | None = None
            try:
                probe_shared(self.storage, channel, self.run_id, timeout_secs)
            except HoldfastError as error:
                problem = error
            what = "the making of a Checkpointer that saves (read_only=False)"
            all_agree(channel, "start/probe", problem, timeout_secs, what=what)
        except BaseException:  # an interrupt in a notebook must not leave the directory held
            self._try_release()
            raise
        if self.mirror is not None:
            self.mirror.start()

    def _acquire(self, mirror_freq: int) -> None:
        self.storage.make_dir()
        self.lease = Lease.acquire(self.storage, run_id=self.run_id)
        self.lease.start_heartbeat()
        heads = self.lease.take_heads() or self.storage.list_heads()
        self._listing = Directory(self.storage, self._seen, heads)
        listed = self._listing.everything()
        self._sequence = highest_sequence(listed)
        here = [record.id for record in committed(listed)]
        self.lease.arrivals.arriving(self.storage, here, lease_name(self.lease.epoch))
        reap_abandoned(self.storage, lease=self.lease, heads=heads)
        if self.second is not None:
            plan = MirrorPlan(mirror_freq, self.retention, self.run_id)
            self.mirror = Mirror(self.storage, self.second, plan, self.listener)
            self.mirror.open(required=self._sequence == 0)

    def take_listing(self) -> Directory | None:
        """The listing made when the directory was acquired, for the first restore.

        None after a commit, after an earlier call, and on ranks that have not acquired the directory.
        """
        listing, self._listing = self._listing, None
        return listing

    def _try_release(self) -> None:
        if self.mirror is not None:
            self.mirror.try_release()
            self.mirror = None
        if self.lease is not None:
            self.lease.try_release()
            self.lease = None

    def publish(
        self,
        info: SaveInfo,
        shards: tuple[ShardReceipt, ...],
        tensors: Mapping[str, TensorInfo],
        aliases: Mapping[str, str],
        objects: Mapping[str, Any],
    ) -> CheckpointRecord:
        """Commit a save whose shards are all confirmed. On rank 0 only."""
        self._listing = None
        # Count before publishing: even if that fails, the manifest may exist.
        self._sequence = max(self._sequence, self.mirror.highest_sequence if self.mirror else 0) + 1
        record = commit(
            self.storage,
            self.lease,
            info,
            shards,
            tensors,
            aliases,
            objects,
            sequence=self._sequence,
            parent=self.parent,
            best=DEFAULT if self.retention is None else self.retention.rule,
        )
        self.parent = record.id
        if self.lease is not None:
            self.lease.arrivals.settle(record.id)
        return record

    def clean_up(self) -> None:
        """After a commit, on rank 0: notify the mirror, then delete expired checkpoints."""
        if self.mirror is not None:
            self.mirror.committed()
        self.delete_expired()

    def delete_expired(self, *, disk_full: bool = False) -> bool:
        """Delete expired checkpoints, never latest, backup or best. Returns whether any was deleted."""
        assert self.lease is not None
        return delete_expired(
            self.storage,
            self.lease,
            self.retention,
            self.mirror,
            disk_full=disk_full,
            memory=self._seen,
            failed_ids=self.failed_ids,
        )

    def release(self, mirror_patience: Patience, *, stuck: bool) -> None:
        """Close the mirror and release the directory. If a save hangs, this run keeps the directory."""
        if self.retention is not None and self.retention != Retention(rolling=self.retention.rolling):
            warn_no_best(self.storage, committed(item for _, item in self._seen.values()), self.retention)
        if self.mirror is not None and stuck:
            self.mirror.close(mirror_patience)
        elif self.mirror is not None and self.lease is not None:
            close_mirror(
                self.mirror, mirror_patience, self.storage, self.lease, self.retention, self.failed_ids
            )
        if self.lease is not None:
            (self.lease.abandon if stuck else self.lease.release)()


def close_mirror(
    mirror: Mirror,
    patience: Patience,
    storage: Storage,
    lease: Lease,
    retention: Retention | None,
    failed_ids: Collection[str] = (),
) -> None:
    """Close the mirror, then delete expired checkpoints that the last clean-up kept as pending copies.

    The next run's clean-up retries what fails here.
    """
    mirror.close(patience)
    try:
        delete_expired(storage, lease, retention, mirror, failed_ids=failed_ids)
    except HoldfastError as error:
        log.warning("clean-up after closing the mirror failed; the next run tries again: %s", error)


def probe_shared(
    storage: Storage,
    channel: Channel,
    nonce: str,
    timeout_secs: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Check that all ranks see the same directory: rank 0 writes a nonce, and every rank reads it.

    Raises: StorageError on a rank that sees another directory, naming the rank and the directory.
    """
    if channel.world_size == 1:
        return
    path = f"{PROBE_PREFIX}{nonce}"

    def write() -> str:
        storage.publish(path, nonce.encode(), exclusive=False)
        return storage.uri

    uri = rank0_decides(channel, "start/nonce", write, timeout_secs)
    problem: StorageError | None = None
    # A network file system may serve an older listing for a while.
    deadline = clock() + min(timeout_secs / 2, 30.0)
    while True:
        try:
            storage.read_bytes(path, max_bytes=1024)
            break
        except NotFoundError:
            if clock() >= deadline:
                problem = StorageError(
                    f"rank {channel.rank} does not see in {storage.uri} the file that rank 0 wrote to {uri}: "
                    "every rank must see the same checkpoint directory; give a shared path or a URI. Ranks "
                    "that save into separate directories need separate process_groups"
                )
                break
        except StorageError as error:
            problem = error  # raised below: rank 0 waits for this rank first
            break
        sleep(0.5)
    channel.gather("start/probed", b"1", timeout_secs)
    if channel.rank == 0:
        storage.delete_file(path)
    if problem is not None:
        raise problem
