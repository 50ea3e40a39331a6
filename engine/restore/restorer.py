"""Restore, all ranks together: agree on a checkpoint, check that it fits, read it, agree that it was whole.

    rank 0       chooses, everybody gets its manifest
    every rank   reads the indexes, matches tensors; all agree that it fits
    every rank   reads its slices, verified; all agree that nothing was damaged
    every rank   hands objects their values, generators last

Damage in the newest checkpoint sends `latest` back to the one before; a checkpoint named explicitly fails.
No rank is left waiting when another finds damage: they meet after every stage, with what they found.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.catalog import marks
from engine.catalog.coverage import coverage_damage
from engine.catalog.listing import read_index
from engine.catalog.record import CheckpointRecord, from_manifest
from engine.dcp.load import plan_slices
from engine.errors import (
    DamagedError,
    HoldfastError,
    NotFoundError,
    RestoreFailedError,
    SelectorError,
)
from engine.format.index import ShardFile, ShardIndex
from engine.format.layout import PlacedChunk
from engine.format.manifest import Manifest
from engine.format.names import MANIFEST
from engine.parallel.agreement import all_agree, rank0_decides
from engine.parallel.coordination import Channel
from engine.restore.choose import choose_checkpoint, in_mirror
from engine.restore.destination import Destination
from engine.restore.read import read_slices
from engine.restore.wanted import Wanted
from engine.snapshot.capture import StateCapture
from engine.storage.base import Storage
from engine.storage.open import open_storage

log = logging.getLogger(__name__)

Places = Mapping[str, list[tuple[ShardFile, PlacedChunk]]]
_INDEX_THREADS = 8


@dataclass(slots=True)
class Restorer:
    """Restores checkpoints into one state. Used from the training thread only.

    Attributes:
        undefined: a restore broke off after it had begun to change the state.
    """

    storage: Storage
    capture: StateCapture
    channel: Channel
    seed: int
    timeout_secs: float
    storage_options: Mapping[str, str] | None
    on_event: Callable[[dict[str, Any]], None]
    read_only: bool = False
    mirror: Storage | None = None
    clock: Callable[[], float] = time.monotonic
    undefined: bool = False
    _number: int = 0
    _chosen: Manifest | None = None
    _passed_over: set[str] = field(default_factory=set)

    def restore(self, selector: str, wanted: Wanted) -> CheckpointRecord | None:
        """Restore what the selector means, in place. None when `latest` finds nothing at all.

        Every rank calls it at the same point.
        Raises: SelectorError; StateMismatchError (nothing was changed); DamagedError when the chosen
            checkpoint, or for `latest` every one, is damaged; RestoreFailedError; StorageError.
        """
        self._passed_over.clear()
        first: HoldfastError | None = None
        while True:
            self._number += 1
            key = f"restore/{self._number}"
            self._chosen = None
            try:
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
                    what = "was retired meanwhile" if gone else "is damaged"
                    instead = "going back to the one before" if self.mirror is None else "trying another"
                    log.warning("%s %s, %s: %s", id, what, instead, error)
                self._passed_over.add(place_of(chosen))

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
        return {
            "target": choice.target,
            "name": choice.name,
            "id": choice.record.id,
            "mirror": choice.tier == "mirror",
            "manifest": choice.manifest.to_bytes().decode("utf-8"),
        }

    def _restore(self, key: str, chosen: Mapping[str, Any], wanted: Wanted) -> CheckpointRecord:
        started = self.clock()
        # Rank 0 has parsed it already.
        manifest = self._chosen or Manifest.from_bytes(
            chosen["manifest"].encode("utf-8"), what=f"the manifest of {chosen['id']}"
        )
        name = str(chosen["name"])
        storage = self._storage_of(chosen)
        destination: Destination | None = None
        places: Places = {}
        problem: Exception | None = None
        try:
            indexes = read_indexes(storage, manifest, name)
            places = chunk_places(manifest, indexes)
            destination = self._destination(manifest, indexes, wanted)
            destination.check(f"the checkpoint {storage.describe(name)}")
        except Exception as error:
            problem = _missing_is_damage(storage, name, error)
        try:
            all_agree(self.channel, f"{key}/fits", problem, self.timeout_secs)
        except HoldfastError:
            if destination is not None:
                destination.abandon()
            raise
        assert destination is not None
        self.undefined = True
        stats = None
        try:
            found = {name: places[saved] for name, saved in destination.sources.items()}
            slices = plan_slices(
                destination.tensors,
                {name: manifest.tensors[saved] for name, saved in destination.sources.items()},
                {name: [placed.chunk for _, placed in held] for name, held in found.items()},
            )
            stats = read_slices(storage, name, slices, found)
            # Still before the agreement: what an object refuses here must stop every rank.
            destination.finish()
        except Exception as error:
            problem = _as_restore_failure(_missing_is_damage(storage, name, error), manifest.id)
        all_agree(self.channel, f"{key}/read", problem, self.timeout_secs)
        assert stats is not None
        self.undefined = False
        record = from_manifest(manifest, storage.uri, name=name)
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

    def _storage_of(self, chosen: Mapping[str, Any]) -> Storage:
        if chosen["mirror"]:
            assert self.mirror is not None, "every rank is given the same mirror"
            return self.mirror
        return open_storage(chosen["target"], self.storage_options) if chosen["target"] else self.storage

    def _destination(self, manifest: Manifest, indexes: list[ShardIndex], wanted: Wanted) -> Destination:
        return Destination(
            self.capture,
            manifest,
            [index.local for index in indexes],
            rank=self.channel.rank,
            world_size=self.channel.world_size,
            seed=self.seed,
            wanted=wanted,
        )

    def _mark(self, chosen: Mapping[str, Any], error: Exception) -> None:
        """Remember the damage in the directory, so that nothing tries this checkpoint first again."""
        if self.read_only:
            return
        try:
            marks.mark_damaged(self._storage_of(chosen), str(chosen["name"]), str(error))
        except HoldfastError as problem:
            log.warning("could not mark %s as damaged: %s", chosen["id"], problem)


def place_of(chosen: Mapping[str, Any]) -> str:
    """How a copy is remembered that was tried in vain: the other tier may have a whole one."""
    return in_mirror(str(chosen["id"])) if chosen["mirror"] else str(chosen["id"])


def read_indexes(storage: Storage, manifest: Manifest, name: str) -> list[ShardIndex]:
    """Every rank's index in the directory `name`, checked against the manifest.

    Raises: DamagedError, NotFoundError, StorageError.
    """
    with ThreadPoolExecutor(min(_INDEX_THREADS, manifest.world_size)) as pool:
        ranks = range(manifest.world_size)
        return list(pool.map(lambda rank: read_index(storage, manifest, rank, name=name), ranks))


def chunk_places(manifest: Manifest, indexes: list[ShardIndex]) -> Places:
    """Every saved chunk by tensor name, with the file that holds it. Pure.

    Raises: DamagedError when the indexes do not describe the manifest's tensors, whole and once.
    """
    places: dict[str, list[tuple[ShardFile, PlacedChunk]]] = defaultdict(list)
    for index in indexes:
        for shard, placed in index.chunks:
            places[placed.chunk.name].append((shard, placed))
    damage = coverage_damage(manifest, indexes)
    if damage:
        raise DamagedError(damage[0].sentence)
    return places


def _missing_is_damage(storage: Storage, name: str, error: Exception) -> Exception:
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
        f"restoring {id} broke off, the state is undefined now: {type(error).__name__}: {error}"
    )
