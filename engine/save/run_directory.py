"""The checkpoint directory as the run that writes to it holds it: lease, order of checkpoints, mirror."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from engine.directory.clean_up import remove_surplus, say_unfed
from engine.directory.listing import Memory, committed, highest_sequence, list_checkpoints
from engine.directory.reaper import reap_abandoned
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention
from engine.errors import DirectoryHeldError, HoldfastError
from engine.format.best import DEFAULT
from engine.format.manifest import ShardReceipt
from engine.format.names import lease_name
from engine.lease.lease import STALE_SECS, Lease
from engine.mirror.uploader import Mirror, MirrorPlan, Patience
from engine.ranks.agreement import all_agree, rank0_decides
from engine.ranks.coordination import Channel
from engine.save.commit import commit
from engine.save.directory_probe import probe_shared
from engine.save.event_listener import Listener
from engine.save.job import Job
from engine.save.unreferenced import settle
from engine.storage.base import Storage

log = logging.getLogger(__name__)


@dataclass(slots=True)
class HeldDirectory:
    """One directory and what rank 0 holds of it. On other ranks it has neither lease nor mirror.

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
    given_up: set[str] = field(default_factory=set)
    """Ids that this run failed to commit. A rank that was late may write into one again."""
    _sequence: int = 0
    _seen: Memory = field(default_factory=dict)

    def take(self, channel: Channel, mirror_freq: int, timeout_secs: float) -> None:
        """Rank 0 takes the leases; then every rank checks that it sees the same directory.

        Raises: whatever kept a rank from it, on every rank; nothing is held then.
        """

        def acquire() -> dict[str, Any]:
            try:
                self._acquire(mirror_freq)
            except DirectoryHeldError:
                self._give_back()
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
            self._give_back()
            raise
        if self.mirror is not None:
            self.mirror.start()

    def _acquire(self, mirror_freq: int) -> None:
        self.storage.make_dir()
        self.lease = Lease.acquire(self.storage, run_id=self.run_id)
        self.lease.start_heartbeat()
        listed = list_checkpoints(self.storage, self._seen)
        self._sequence = highest_sequence(listed)
        here = [record.id for record in committed(listed)]
        self.lease.arrivals.arriving(self.storage, here, lease_name(self.lease.epoch))
        reap_abandoned(self.storage, lease=self.lease)
        if self.second is not None:
            plan = MirrorPlan(mirror_freq, self.retention, self.run_id)
            self.mirror = Mirror(self.storage, self.second, plan, self.listener)
            self.mirror.open(required=self._sequence == 0)

    def _give_back(self) -> None:
        if self.mirror is not None:
            self.mirror.give_back()
            self.mirror = None
        if self.lease is not None:
            self.lease.give_back()
            self.lease = None

    def publish(self, job: Job, shards: tuple[ShardReceipt, ...]) -> CheckpointRecord:
        """Commit a save: rank 0 alone, once every shard is confirmed."""
        # Counted up before the attempt: a manifest whose publishing failed may be there all the same.
        self._sequence = max(self._sequence, self.mirror.highest_sequence if self.mirror else 0) + 1
        record = commit(
            self.storage,
            self.lease,
            job.info,
            shards,
            job.tensors,
            job.aliases,
            job.objects,
            sequence=self._sequence,
            parent=self.parent,
            best=DEFAULT if self.retention is None else self.retention.rule,
        )
        self.parent = record.id
        if self.lease is not None:
            self.lease.arrivals.settle(record.id)
        return record

    def clean_up(self, record: CheckpointRecord) -> None:
        """What follows a commit, by rank 0: the mirror hears of it, then retention."""
        if self.mirror is not None:
            self.mirror.committed()
        self.remove_surplus()

    def remove_surplus(self, *, disk_full: bool = False) -> bool:
        """Whether anything was removed. Never latest, backup or best."""
        assert self.lease is not None
        return remove_surplus(
            self.storage,
            self.lease,
            self.retention,
            self.mirror,
            disk_full=disk_full,
            memory=self._seen,
            given_up=self.given_up,
        )

    def let_go(self, mirror_patience: Patience, *, stuck: bool) -> None:
        """Close the mirror and give the directory back; with a save that hangs it stays this run's."""
        if self.retention is not None and self.retention != Retention(rolling=self.retention.rolling):
            say_unfed(self.storage, committed(item for _, item in self._seen.values()), self.retention)
        if self.mirror is not None and stuck:
            self.mirror.close(mirror_patience)
        elif self.mirror is not None and self.lease is not None:
            close_mirror(
                self.mirror, mirror_patience, self.storage, self.lease, self.retention, self.given_up
            )
        if self.lease is not None:
            (self.lease.abandon if stuck else self.lease.release)()


def close_mirror(
    mirror: Mirror,
    patience: Patience,
    storage: Storage,
    lease: Lease,
    retention: Retention | None,
    given_up: Collection[str] = (),
) -> None:
    """Close the mirror, then remove what the last clean-up spared because the mirror was owed it.

    What fails here is tried again by the next run's clean-up.
    """
    mirror.close(patience)
    try:
        remove_surplus(storage, lease, retention, mirror, given_up=given_up)
    except HoldfastError as error:
        log.warning("cleaning up after the mirror failed, the next run tries again: %s", error)
