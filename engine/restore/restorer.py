"""Restore, all ranks together: agree on a checkpoint, check that it fits, read it, agree that it was whole.

    rank 0       chooses, reads all indexes; everybody gets the manifest and where the chunks lie
    every rank   matches tensors, plans, reads the indexes that takes; all agree that it fits
    every rank   reads its slices, verified; all agree that nothing was damaged
    every rank   hands objects their values, generators last

Damage in the newest checkpoint sends `latest` back to the one before; a checkpoint named explicitly fails.
No rank is left waiting when another finds damage: they meet after every stage, with what they found.
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
from engine.directory.record import CheckpointRecord, from_manifest
from engine.errors import (
    CoordinationError,
    DamagedError,
    HoldfastError,
    NotFoundError,
    RestoreFailedError,
    SelectorError,
)
from engine.format.manifest import Manifest
from engine.format.names import MANIFEST
from engine.gc_pause import collector_paused
from engine.ranks.agreement import all_agree, open_call, rank0_decides
from engine.ranks.calls import RESTORE, Call, Calls, Request, end_call
from engine.ranks.coordination import Channel
from engine.restore.choice import choose_checkpoint, in_mirror
from engine.restore.chunk_locations import (
    Indexes,
    Locals,
    chunk_places,
    describe_chunks,
    places_of,
    read_description,
)
from engine.restore.destination import Destination
from engine.restore.filters import Wanted
from engine.restore.load_plan import Located, Slice, plan_reads
from engine.restore.other_ranks import unexpected_on_all
from engine.restore.read import LOCAL_PACE, STORE_PACE, ReadStats, read_slices
from engine.restore.stored import read_stored
from engine.state.capture import StateCapture
from engine.storage.base import Storage
from engine.storage.open import open_storage

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Restorer:
    """Restores checkpoints into one state. Used from the training thread only.

    Attributes:
        undefined: a restore broke off after it had begun to change the state.
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
    _chosen: Manifest | None = None
    _passed_over: set[str] = field(default_factory=set)
    _seen: str | None = None
    """What the chosen checkpoint's files were before they were read, on rank 0."""
    _unmarked: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Damaged checkpoints that could not be marked, known to rank 0 alone: place -> name, what was seen."""

    def restore(self, selector: str, wanted: Wanted) -> CheckpointRecord | None:
        """Restore what the selector means, in place. None when `latest` finds nothing at all.

        Every rank calls it at the same point.
        Raises: SelectorError; StateMismatchError (nothing was changed); DamagedError when the chosen
            checkpoint, or for `latest` every one, is damaged; RestoreFailedError; StorageError.
        """
        call = open_call(self.calls, Request(RESTORE, selector), together=self.capture.asks_together)
        try:
            return self._all_restore(call, selector, wanted)
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

    def _all_restore(self, call: Call, selector: str, wanted: Wanted) -> CheckpointRecord | None:
        """All ranks have come: try one checkpoint after the other."""
        self._passed_over = self._known_damaged()
        first: HoldfastError | None = None
        for attempt in itertools.count():
            key = f"{call.key}/{attempt}"
            self._chosen = None
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
                return self._restore(key, chosen, wanted)
            except (DamagedError, NotFoundError) as error:
                id = str(chosen["id"])
                gone = isinstance(error, NotFoundError)
                if self.channel.rank == 0 and not gone:
                    self._mark(chosen, error)
                if place_of(chosen) in self._passed_over:
                    raise
                if selector != "latest":
                    if self.mirror is None or chosen["mirror"] or chosen["target"]:
                        raise
                    selector, first = id, error  # the mirror's copy of it, or none
                if self.channel.rank == 0:
                    what = "was deleted meanwhile" if gone else "is damaged"
                    instead = "going back to the one before" if self.mirror is None else "trying another"
                    log.warning("%s %s, %s: %s", id, what, instead, error)
                self._passed_over.add(place_of(chosen))
        raise AssertionError("counting has no end")

    @property
    def channel(self) -> Channel:
        """The training thread's."""
        return self.calls.channel

    def _choose(self, selector: str) -> dict[str, Any] | None:
        choice = choose_checkpoint(
            self.storage,
            selector,
            passed_over=self._passed_over,
            options=self.storage_options,
            mirror=self.mirror,
        )
        if choice is None:
            return None
        self._chosen = choice.manifest
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

    def _restore(self, key: str, chosen: Mapping[str, Any], wanted: Wanted) -> CheckpointRecord:
        started = self.clock()
        # Rank 0 has parsed it already.
        manifest = self._chosen or Manifest.from_bytes(
            chosen["manifest"].encode("utf-8"), what=f"the manifest of {chosen['id']}"
        )
        name = str(chosen["name"])
        storage = self._storage_of(chosen)
        with collector_paused():
            destination, slices, found = self._prepare(key, storage, name, manifest, wanted)
        if self.channel.rank == 0:
            # Every rank has read them, or it could not have agreed.
            with contextlib.suppress(CoordinationError):
                self.channel.forget([f"{key}/choice", f"{key}/chunks", f"{key}/nowhere"])
                self.calls.forget(self.calls.mark())
        self.undefined = True
        stats: ReadStats | None = None
        problem: Exception | None = None
        try:
            pace = LOCAL_PACE if storage.is_local else STORE_PACE
            stats = read_slices(storage, name, slices, found, pace=pace)
            # Still before the agreement: what an object refuses here must stop every rank.
            destination.finish()
        except Exception as error:
            problem = _as_restore_failure(missing_is_damage(storage, name, error), manifest.id)
        all_agree(
            self.channel, f"{key}/read", problem, self.timeout_secs, what=f"the restore of {manifest.id}"
        )
        assert stats is not None
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

    def _prepare(
        self, key: str, storage: Storage, name: str, manifest: Manifest, wanted: Wanted
    ) -> tuple[Destination, list[Slice], Located]:
        """Where everything lies and goes; returns when all ranks agree that it fits."""
        indexes = Indexes(storage, manifest, name)
        self._read_ahead(indexes, manifest)
        chunks = self._chunks(key, storage, name, manifest, indexes)
        destination: Destination | None = None
        problem: Exception | None = None
        slices: list[Slice] = []
        found: Located = {}
        try:
            if chunks is None or self.channel.rank == 0:
                places = places_of(indexes.every())
            else:
                places = read_description(manifest, chunks)
            destination = self._destination(manifest, indexes, wanted)
        except Exception as error:
            problem = missing_is_damage(storage, name, error)
        try:
            mine = destination.unexpected if destination is not None else None
            what = f"the restore of {manifest.id}"
            nowhere = unexpected_on_all(self.channel, key, mine, self.timeout_secs, what)
            if destination is not None:
                destination.check(f"the checkpoint {storage.describe(name)}", nowhere)
                slices, found = plan_reads(
                    destination.tensors, destination.sources, manifest, places, indexes
                )
        except CoordinationError:  # every rank that has come knows that not all have
            if destination is not None:
                destination.abandon()
            raise
        except Exception as error:
            problem = problem or missing_is_damage(storage, name, error)
        try:
            all_agree(self.channel, f"{key}/fits", problem, self.timeout_secs, what=what)
        except Exception:
            if destination is not None:
                destination.abandon()
            raise
        assert destination is not None
        return destination, slices, found

    def _storage_of(self, chosen: Mapping[str, Any]) -> Storage:
        if chosen["mirror"]:
            assert self.mirror is not None, "every rank is given the same mirror"
            return self.mirror
        return open_storage(chosen["target"], self.storage_options) if chosen["target"] else self.storage

    def _chunks(
        self, key: str, storage: Storage, name: str, manifest: Manifest, indexes: Indexes
    ) -> str | None:
        """Where every chunk lies: rank 0 has read all indexes and says so.

        None: too long to say, or there is nobody to tell.
        """

        def describe() -> str | None:
            try:
                if self.channel.world_size == 1:
                    chunk_places(manifest, indexes.every())
                    return None
                return describe_chunks(manifest, indexes.every())
            except NotFoundError as error:
                problem = missing_is_damage(storage, name, error)
                if problem is error:
                    raise
                raise problem from error

        text: str | None = rank0_decides(self.channel, f"{key}/chunks", describe, self.timeout_secs)
        return text

    def _read_ahead(self, indexes: Indexes, manifest: Manifest) -> None:
        """While rank 0 reads all indexes, the others read those that they are likely to need."""
        rank, world_size = self.channel.rank, self.channel.world_size
        if rank == 0:
            return
        same_part = rank * manifest.world_size // world_size
        for saved in {same_part} if manifest.world_size == world_size else {0, same_part}:
            with contextlib.suppress(Exception):  # it comes up again where it is needed
                indexes.fetch([saved])

    def _destination(self, manifest: Manifest, indexes: Indexes, wanted: Wanted) -> Destination:
        if manifest.world_size != self.channel.world_size and self.capture.per_rank:
            indexes.every()  # all ranks' values will be asked for: read them side by side
        return Destination(
            self.capture,
            manifest,
            Locals(indexes, manifest.world_size),
            rank=self.channel.rank,
            world_size=self.channel.world_size,
            seed=self.seed,
            wanted=wanted,
        )

    def _known_damaged(self) -> set[str]:
        """What was found damaged here, could not be marked, and has not changed since."""
        for place, (name, seen) in list(self._unmarked.items()):
            tier = self.mirror if place == in_mirror(name) else self.storage
            assert tier is not None
            now = _seen(tier, name)
            if seen is not None and now is not None and now != seen:
                del self._unmarked[place]
        return set(self._unmarked)

    def _mark(self, chosen: Mapping[str, Any], error: Exception) -> None:
        """Remember the damage, in the directory if it may be written, so that it is not tried first again."""
        if not chosen["target"]:
            self._unmarked[place_of(chosen)] = str(chosen["name"]), self._seen
        if self.read_only:
            return
        try:
            name = str(chosen["name"])
            marks.mark_damaged(self._storage_of(chosen), name, str(error), seen=self._seen)
            self._unmarked.pop(place_of(chosen), None)
        except HoldfastError as problem:
            log.warning("could not mark %s as damaged: %s", chosen["id"], problem)


def place_of(chosen: Mapping[str, Any]) -> str:
    """How a copy that failed is remembered: the other tier may have a whole one."""
    return in_mirror(str(chosen["id"])) if chosen["mirror"] else str(chosen["id"])


def _seen(storage: Storage, name: str) -> str | None:
    """Which bytes are about to be read; None where that cannot be told."""
    with contextlib.suppress(HoldfastError):
        return marks.seen(storage, name)
    return None


def missing_is_damage(storage: Storage, name: str, error: Exception) -> Exception:
    """A file that is gone while the manifest stands is damage; gone with its manifest, it was retired."""
    try:
        if isinstance(error, NotFoundError) and storage.exists(f"{name}/{MANIFEST}"):
            return DamagedError(f"{storage.describe(name)} lacks a file that its manifest lists: {error}")
    except HoldfastError as outage:
        return outage
    return error


def _as_restore_failure(error: Exception, id: str) -> Exception:
    if isinstance(error, HoldfastError):
        return error
    return RestoreFailedError(
        f"the restore of {id} broke off, the state is now undefined: {type(error).__name__}: {error}"
    )
