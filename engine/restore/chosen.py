"""Restore the checkpoint that rank 0 has chosen, all ranks together.

    every rank   matches tensors, plans its reads, reads the indexes that they need
    all ranks    agree that the checkpoint fits; nothing has changed until then
    every rank   reads and verifies its slices, and hands objects their values, generators last
    all ranks    agree that nothing was damaged

No rank is left waiting when another one finds damage: they meet after every stage and say what they found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import CoordinationError, DamagedError, HoldfastError, NotFoundError, RestoreFailedError
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.manifest import Manifest
from engine.format.names import MANIFEST
from engine.ranks.agreement import VERDICT_GRACE_SECS, all_agree, rank0_decides
from engine.ranks.calls import Calls
from engine.ranks.coordination import Channel
from engine.restore.chunk_locations import (
    Indexes,
    LocalValues,
    describe_locations,
    locate_chunks,
    locations_of,
    parse_locations,
)
from engine.restore.destination import Destination
from engine.restore.filters import Filter
from engine.restore.load_plan import Located, Slice, plan_reads
from engine.restore.read import LOCAL_PACE, STORE_PACE, ReadStats, read_slices
from engine.state.capture import StateCapture
from engine.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Chosen:
    """A checkpoint that rank 0 has chosen, as every rank sees it.

    name: its directory in `storage`. key: the prefix of the ranks' notes about it.
    """

    manifest: Manifest
    storage: Storage
    name: str
    key: str

    @property
    def what(self) -> str:
        """The operation, for messages."""
        return f"the restore of {self.manifest.id}"


@dataclass(slots=True)
class ChosenRestore:
    """One rank's part in the restore of a chosen checkpoint."""

    chosen: Chosen
    capture: StateCapture
    filter: Filter
    calls: Calls
    seed: int
    timeout_secs: float
    _destination: Destination | None = None
    _slices: list[Slice] = field(default_factory=list)
    _located: Located = field(default_factory=dict)

    def prepare(self) -> None:
        """Plan the reads; returns when all ranks agree that the checkpoint fits. Changes nothing live."""
        try:
            self._prepare()
        except Exception:
            if self._destination is not None:
                self._destination.abandon()
            raise
        if self._channel.rank == 0:
            # Every rank has read these notes, or it could not have agreed.
            with contextlib.suppress(CoordinationError):
                self._channel.forget(
                    [f"{self.chosen.key}/{note}" for note in ("choice", "chunks", "nowhere")]
                )
                self.calls.forget(self.calls.mark())

    def read(self) -> ReadStats:
        """Read, verify and hand over; returns when all ranks agree that nothing was damaged."""
        chosen, destination = self.chosen, self._destination
        assert destination is not None, "call prepare() before read()"
        stats: ReadStats | None = None
        problem: Exception | None = None
        try:
            pace = LOCAL_PACE if chosen.storage.is_local else STORE_PACE
            stats = read_slices(chosen.storage, chosen.name, self._slices, self._located, pace=pace)
            # Before the agreement: what an object refuses on this rank must stop every rank.
            destination.finish()
        except Exception as error:
            problem = _as_restore_failure(self._missing_as_damage(error), chosen.manifest.id)
        all_agree(self._channel, f"{chosen.key}/read", problem, self.timeout_secs, what=chosen.what)
        assert stats is not None
        return stats

    @property
    def _channel(self) -> Channel:
        return self.calls.channel

    def _prepare(self) -> None:
        chosen = self.chosen
        manifest, key = chosen.manifest, chosen.key
        indexes = Indexes(chosen.storage, manifest, chosen.name)
        self._read_ahead(indexes)
        description = self._description(indexes)
        problem: Exception | None = None
        try:
            if description is None or self._channel.rank == 0:
                places = locations_of(indexes.every())
            else:
                places = parse_locations(manifest, description)
            self._destination = self._make_destination(indexes)
        except Exception as error:
            problem = self._missing_as_damage(error)
        destination = self._destination
        try:
            mine = destination.unexpected if destination is not None else None
            nowhere = unexpected_on_all(self._channel, key, mine, self.timeout_secs, chosen.what)
            if destination is not None:
                destination.check(f"the checkpoint {chosen.storage.describe(chosen.name)}", nowhere)
                self._slices, self._located = plan_reads(
                    destination.tensors, destination.sources, manifest, places, indexes
                )
        except CoordinationError:  # every rank that has arrived learns that not all have
            raise
        except Exception as error:
            problem = problem or self._missing_as_damage(error)
        all_agree(self._channel, f"{key}/fits", problem, self.timeout_secs, what=chosen.what)

    def _read_ahead(self, indexes: Indexes) -> None:
        """While rank 0 reads all indexes, the other ranks read those that they are likely to need."""
        rank, world_size = self._channel.rank, self._channel.world_size
        if rank == 0:
            return
        saved_size = self.chosen.manifest.world_size
        same_part = rank * saved_size // world_size
        for saved in {same_part} if saved_size == world_size else {0, same_part}:
            with contextlib.suppress(Exception):  # it is raised again where the index is needed
                indexes.fetch([saved])

    def _description(self, indexes: Indexes) -> str | None:
        """Where every chunk is: rank 0 has read all indexes and tells the others.

        None when that is too long to tell, or there is no other rank.
        """
        manifest = self.chosen.manifest

        def describe() -> str | None:
            try:
                if self._channel.world_size == 1:
                    locate_chunks(manifest, indexes.every())
                    return None
                return describe_locations(manifest, indexes.every())
            except NotFoundError as error:
                problem = self._missing_as_damage(error)
                if problem is error:
                    raise
                raise problem from error

        text: str | None = rank0_decides(
            self._channel, f"{self.chosen.key}/chunks", describe, self.timeout_secs
        )
        return text

    def _make_destination(self, indexes: Indexes) -> Destination:
        manifest, channel = self.chosen.manifest, self._channel
        if manifest.world_size != channel.world_size and self.capture.per_rank:
            indexes.every()  # all ranks' values will be needed: read their indexes in parallel
        return Destination(
            self.capture,
            manifest,
            LocalValues(indexes, manifest.world_size),
            rank=channel.rank,
            world_size=channel.world_size,
            seed=self.seed,
            filter=self.filter,
        )

    def _missing_as_damage(self, error: Exception) -> Exception:
        """A missing file is damage while the manifest is there; without it, the checkpoint was deleted."""
        storage, name = self.chosen.storage, self.chosen.name
        try:
            if isinstance(error, NotFoundError) and storage.exists(f"{name}/{MANIFEST}"):
                return DamagedError(f"{storage.describe(name)} lacks a file that its manifest lists: {error}")
        except HoldfastError as outage:
            return outage
        return error


def unexpected_on_all(
    channel: Channel, key: str, unexpected: Sequence[str] | None, timeout_secs: float, what: str
) -> frozenset[str]:
    """The names that no rank has a place for: pipeline stages and experts differ between ranks.

    Every rank calls it; one that has failed gives None.
    Raises: LateRanksError, on every rank, naming those that did not come to `what`; CoordinationError.
    """
    note = canonical_bytes(None if unexpected is None else list(unexpected))
    if channel.rank != 0:
        channel.gather(f"{key}/unexpected", note, 0)

    def ask() -> list[str]:
        raws = channel.gather(f"{key}/unexpected", note, timeout_secs, what=what)
        assert raws is not None, "only rank 0 asks"
        lists = [parse_canonical(raw, what="a list of names") for raw in raws]
        return sorted(nowhere([names for names in lists if names is not None]))

    return frozenset(rank0_decides(channel, f"{key}/nowhere", ask, timeout_secs + VERDICT_GRACE_SECS))


def nowhere(lists: Sequence[Sequence[str]]) -> set[str]:
    """The names that are in all of the lists. Pure."""
    return set.intersection(*map(set, lists)) if lists else set()


def _as_restore_failure(error: Exception, id: str) -> Exception:
    if isinstance(error, HoldfastError):
        return error
    return RestoreFailedError(
        f"the restore of {id} stopped halfway, and the state is now undefined: "
        f"{type(error).__name__}: {error}"
    )
