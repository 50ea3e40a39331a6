"""Tells abandoned attempts from checkpoints that are still being copied in.

A user may copy a checkpoint into the directory while a run writes there: with `cp`, `rsync` or `aws s3
sync`, for hours, in any order of files. Until its manifest arrives it looks like an abandoned attempt. So an
attempt that no known run began is left alone until nothing in it has changed for QUIET_SECS, by this
process's clock or by the storage's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from engine.errors import NotFoundError
from engine.storage.base import Storage

QUIET_SECS = 3600.0
"""An attempt that no known run began counts as abandoned after this long without a change.

Long, because nothing is urgent: attempts that runs left behind are recognised by their names and deleted at
once. A copy that waits for a slow network is worth more than the space.
"""

Fingerprint = tuple[tuple[str, str], ...]


class Arrivals:
    """The state of attempts that no known run began, and since when it is unchanged. One per lease."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[Fingerprint, float]] = {}
        self.removing: set[str] = set()
        """Checkpoints that this holder has begun to delete: a half-deleted one is not an arriving copy."""
        self._settled: set[str] | None = None

    def is_over(self, storage: Storage, name: str, reference: str, uploads: Collection[str] = ()) -> bool:
        """Whether nothing in the directory `name` has changed for QUIET_SECS.

        Args:
            reference: a file written a moment ago; its time stands for now on the storage's clock.
            uploads: paths of unfinished uploads into the directory.
        """
        quiet_secs = self._unchanged_secs(name, (*_fingerprint(storage, name), *((u, "") for u in uploads)))
        return quiet_secs >= QUIET_SECS or _age_secs(storage, name, reference) >= QUIET_SECS

    def settle(self, id: str) -> None:
        """This holder committed the checkpoint `id` itself: it is not arriving."""
        if self._settled is not None:
            self._settled.add(id)

    def arriving(self, storage: Storage, ids: Collection[str], reference: str) -> set[str]:
        """Of the committed checkpoints `ids`, those that others have copied in since the first call.

        Their sizes are right, but their bytes may still be arriving; and an old checkpoint was copied in for
        a reason. Until they have been unchanged for QUIET_SECS, retention neither deletes them nor deletes
        others because of them.
        """
        if self._settled is None:
            self._settled = set(ids)
        new = set(ids) - self._settled
        arriving = {id for id in new if not self.is_over(storage, id, reference)}
        self._settled |= new - arriving
        return arriving

    def keep_only(self, names: Collection[str]) -> None:
        """Forget all other names. A deleted checkpoint may come back as a copy."""
        self.removing.intersection_update(names)
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}

    def _unchanged_secs(self, name: str, fingerprint: Fingerprint) -> float:
        now = self._clock()
        known, since = self._seen.get(name, (None, now))
        if known != fingerprint:
            self._seen[name] = fingerprint, now
            return 0.0
        return now - since


def _fingerprint(storage: Storage, name: str) -> Fingerprint:
    try:
        return tuple(sorted(storage.versions(name).items()))
    except NotFoundError:
        return ()  # only unfinished uploads, or deleted since


def _age_secs(storage: Storage, name: str, reference: str) -> float:
    """Seconds since the last change, by the storage's clock; 0 where that is unknown."""
    try:
        changed, now = storage.last_change(name), storage.last_change(reference)
    except NotFoundError:
        return 0.0
    return 0.0 if changed is None or now is None else now - changed
