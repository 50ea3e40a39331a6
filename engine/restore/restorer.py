"""Restore, all ranks together: rank 0 chooses a checkpoint, and all ranks restore it or go on to another.

Damage in the newest checkpoint sends `latest` back to the one before it; a checkpoint that was named fails.
`engine.restore.chosen` restores one checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.directory import marks
from engine.directory.listing import Directory
from engine.directory.record import CheckpointRecord, from_manifest
from engine.errors import CoordinationError, DamagedError, HoldfastError, NotFoundError, SelectorError
from engine.format.manifest import Manifest
from engine.gc_pause import collector_paused
from engine.mirror.tiers import Tier
from engine.ranks.agreement import open_call, rank0_decides
from engine.ranks.calls import RESTORE, Call, Calls, Request, end_call
from engine.ranks.coordination import Channel
from engine.restore.choice import choose_checkpoint, copy_name, in_mirror, storage_of
from engine.restore.chosen import Chosen, ChosenRestore
from engine.restore.filters import Filter
from engine.restore.stored import read_stored
from engine.state.capture import StateCapture
from engine.storage.base import Storage

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Restorer:
    """Restores checkpoints into one state. Used from the training thread only.

    Attributes:
        undefined: a restore failed after it had begun to change the state.
    """

    storage: Storage
    capture: StateCapture
    calls: Calls
    seed: int
    timeout_secs: float
    storage_options: Mapping[str, str] | None
    on_event: Callable[[dict[str, Any]], None]
    read_only: bool = False
    mirror: Storage | None = None
    clock: Callable[[], float] = time.monotonic
    undefined: bool = False
    _manifest: Manifest | None = None
    """The chosen checkpoint's, on rank 0, which has parsed it."""
    _listing: Directory | None = None
    _passed_over: set[str] = field(default_factory=set)
    _seen: str | None = None
    """What the chosen checkpoint's files were before they were read, on rank 0."""
    _unmarked: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Damaged copies that could not be marked, on rank 0: copy -> its name, what was seen of it."""

    def restore(
        self, selector: str, filter: Filter, listing: Directory | None = None
    ) -> CheckpointRecord | None:
        """Restore what the selector means, in place. None when `latest` finds nothing at all.

        Every rank calls it at the same point. `listing`: an earlier one, which is used if the directory still
        has the same names.
        Raises: SelectorError; StateMismatchError (nothing was changed); DamagedError when the chosen
            checkpoint, or for `latest` every one, is damaged; RestoreFailedError; StorageError.
        """
        call = open_call(self.calls, Request(RESTORE, selector), together=self.capture.asks_together)
        self._listing = listing
        try:
            return self._restore_any(call, selector, filter)
        except CoordinationError:
            end_call(self.channel, call)
            raise

    def read(self, selector: str, include: Sequence[str]) -> dict[str, Any]:
        """What a checkpoint holds, by state key. Rank-local."""
        return read_stored(
            self.storage,
            selector,
            include,
            rank=self.channel.rank,
            world_size=self.channel.world_size,
            options=self.storage_options,
            mirror=self.mirror,
        )

    @property
    def channel(self) -> Channel:
        """The training thread's."""
        return self.calls.channel

    def _restore_any(self, call: Call, selector: str, filter: Filter) -> CheckpointRecord | None:
        """Try one checkpoint after the other, until one is whole or none is left."""
        self._passed_over = self._known_damaged()
        first: HoldfastError | None = None
        for attempt in itertools.count():
            key = f"{call.key}/{attempt}"
            self._manifest = None
            try:
                with collector_paused():
                    chosen = rank0_decides(
                        self.channel, f"{key}/choice", partial(self._choose, selector), self.timeout_secs
                    )
            except SelectorError as error:
                raise first or error from None
            if chosen is None:
                return None
            try:
                return self._restore(key, chosen, filter)
            except (DamagedError, NotFoundError) as error:
                self._after_damage(chosen, selector, error)
                if selector != "latest":
                    selector, first = str(chosen["id"]), error  # the mirror's copy of it, or none
        raise AssertionError("itertools.count() does not end")

    def _choose(self, selector: str) -> dict[str, Any] | None:
        """What rank 0 has chosen, as JSON for all ranks."""
        listing, self._listing = self._listing, None
        choice = choose_checkpoint(
            self.storage,
            selector,
            listing=listing if listing is not None and listing.is_current() else None,
            passed_over=self._passed_over,
            options=self.storage_options,
            mirror=self.mirror,
        )
        if choice is None:
            return None
        self._manifest = choice.manifest
        chosen = {
            "target": choice.target,
            "name": choice.name,
            "id": choice.record.id,
            "mirror": choice.tier == "mirror",
            "digest": choice.record.manifest_digest,
            "manifest": "" if self.channel.world_size == 1 else choice.manifest.to_bytes().decode("utf-8"),
        }
        self._seen = _seen(self._storage_of(chosen), choice.name)
        return chosen

    def _restore(self, key: str, chosen: Mapping[str, Any], filter: Filter) -> CheckpointRecord:
        started = self.clock()
        manifest = self._manifest or Manifest.from_bytes(
            chosen["manifest"].encode("utf-8"), what=f"the manifest of {chosen['id']}"
        )
        storage, name = self._storage_of(chosen), str(chosen["name"])
        restore = ChosenRestore(
            Chosen(manifest, storage, name, key),
            self.capture,
            filter,
            self.calls,
            self.seed,
            self.timeout_secs,
        )
        with collector_paused():
            restore.prepare()
        self.undefined = True
        stats = restore.read()
        self.undefined = False
        record = from_manifest(manifest, storage.uri, name=name, manifest_digest=str(chosen["digest"]))
        self.on_event(
            {
                "event": "restored",
                "step": record.step,
                "id": record.id,
                "path": record.path,
                "world_size": manifest.world_size,
                "bytes": stats.read_bytes,
                "needed_bytes": stats.needed_bytes,
                "secs": self.clock() - started,
            }
        )
        return record

    def _after_damage(self, chosen: Mapping[str, Any], selector: str, error: HoldfastError) -> None:
        """Mark and pass over the copy that failed. Raises the error when there is no other copy to try."""
        deleted = isinstance(error, NotFoundError)
        copy = _copy_name(chosen)
        if self.channel.rank == 0 and not deleted:
            self._mark(chosen, error)
        if copy in self._passed_over:
            raise error
        if selector != "latest" and (self.mirror is None or chosen["mirror"] or chosen["target"]):
            raise error
        if self.channel.rank == 0:
            what = "was deleted during the restore" if deleted else "is damaged"
            instead = "falling back to the one before it" if self.mirror is None else "trying another"
            log.warning("%s %s, %s: %s", chosen["id"], what, instead, error)
        self._passed_over.add(copy)

    def _storage_of(self, chosen: Mapping[str, Any]) -> Storage:
        return storage_of(chosen["target"], _tier(chosen), self.storage, self.mirror, self.storage_options)

    def _known_damaged(self) -> set[str]:
        """The copies that were damaged here before, could not be marked, and have not changed since."""
        for copy, (name, seen) in list(self._unmarked.items()):
            tier = self.mirror if copy == in_mirror(name) else self.storage
            assert tier is not None
            now = _seen(tier, name)
            if seen is not None and now is not None and now != seen:
                del self._unmarked[copy]
        return set(self._unmarked)

    def _mark(self, chosen: Mapping[str, Any], error: Exception) -> None:
        """Remember the damage, so that this copy is not tried first again: in the directory if allowed."""
        copy = _copy_name(chosen)
        if not chosen["target"]:
            self._unmarked[copy] = str(chosen["name"]), self._seen
        if self.read_only:
            return
        try:
            name = str(chosen["name"])
            marks.mark_damaged(self._storage_of(chosen), name, str(error), seen=self._seen)
            self._unmarked.pop(copy, None)
        except HoldfastError as problem:
            log.warning("could not mark %s as damaged: %s", chosen["id"], problem)


def _copy_name(chosen: Mapping[str, Any]) -> str:
    return copy_name(str(chosen["id"]), _tier(chosen))


def _tier(chosen: Mapping[str, Any]) -> Tier:
    return "mirror" if chosen["mirror"] else "local"


def _seen(storage: Storage, name: str) -> str | None:
    """What identifies the bytes that are about to be read; None if the storage cannot say."""
    with contextlib.suppress(HoldfastError):
        return marks.seen(storage, name)
    return None
