"""The checkpoint directory as the run that writes to it holds it: lease, order of checkpoints, mirror."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.directory.clean_up import delete_expired, warn_no_best
from engine.directory.listing import Directory, Memory, committed, highest_sequence
from engine.directory.reaper import reap_abandoned
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention
from engine.errors import DirectoryHeldError, HoldfastError
from engine.format.best import DEFAULT
from engine.format.manifest import ShardReceipt, TensorInfo
from engine.format.names import lease_name
from engine.lease.lease import STALE_SECS, Lease
from engine.mirror.uploader import Mirror, MirrorPlan, Patience
from engine.ranks.agreement import all_agree, rank0_decides
from engine.ranks.coordination import Channel
from engine.save.commit import SaveInfo, commit
from engine.save.directory_probe import probe_shared
from engine.save.event_listener import Listener
from engine.save.unreferenced import settle
from engine.storage.base import Storage

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RunDirectory:
    """The directory that a run writes to. Only rank 0 has its lease and its mirror.

    Args:
        run_id: names this run in the lease and in the probe.
        second: the storage of the mirror, if there is one.
        parent: id of the checkpoint that the next one follows.
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
    """Ids that this run failed to commit. A rank that was late may still write into one."""
    _sequence: int = 0
    _seen: Memory = field(default_factory=dict)
    _listing: Directory | None = None

    def take(self, channel: Channel, mirror_freq: int, timeout_secs: float) -> None:
        """Rank 0 takes the leases; then every rank checks that it sees the same directory.

        Raises: whatever kept a rank from it, on every rank; nothing is held then.
        """

        def acquire() -> dict[str, Any]:
            try:
                self._acquire(mirror_freq)
            except DirectoryHeldError:
                self._try_release()
                if not settle(timeout_secs):
                    raise
                self._acquire(mirror_freq)  # it may have been held by a Checkpointer that nobody holds
            return {}

        try:
            # Rank 0 may have to watch for so long whether another holder lives.
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
        """The listing that was made when the directory was acquired, for the first restore.

        None after a commit, after an earlier call, and where this rank has not acquired the directory.
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
        """Commit a save, on rank 0 alone, once every shard is confirmed."""
        self._listing = None
        # Counted up before the attempt: a manifest whose publishing failed may be there all the same.
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
        """After a commit, on rank 0: tell the mirror, then delete expired checkpoints."""
        if self.mirror is not None:
            self.mirror.committed()
        self.delete_expired()

    def delete_expired(self, *, disk_full: bool = False) -> bool:
        """Whether anything was deleted. Never latest, backup or best."""
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
        """Close the mirror and give the directory back; with a save that hangs it stays this run's."""
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
    """Close the mirror, then remove what the last clean-up spared because the mirror was owed it.

    What fails here is tried again by the next run's clean-up.
    """
    mirror.close(patience)
    try:
        delete_expired(storage, lease, retention, mirror, failed_ids=failed_ids)
    except HoldfastError as error:
        log.warning("cleaning up after the mirror failed, the next run tries again: %s", error)
