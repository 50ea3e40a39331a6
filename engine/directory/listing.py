"""List a checkpoint directory: every attempt in it, committed, partial or damaged.

One pass lists the directories; then each manifest is read. On a store, whose listings are paged, that pass
leaves out the shards: only `verify` checks their sizes. A listing that fails raises: an outage is never
mistaken for an empty directory.

Checkpoints are ordered by commit, and only the manifests record that order: a run that goes back to step 100
commits step 110 after step 300. So `latest` reads each manifest once, in parallel, and nothing else
(`Directory`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from engine.directory import marks
from engine.directory.damage import size_damage
from engine.directory.record import CheckpointRecord, from_manifest
from engine.errors import DamagedError, NotFoundError
from engine.format.digest import bytes_digest
from engine.format.index import ShardIndex
from engine.format.json import MAX_BYTES
from engine.format.manifest import Manifest
from engine.format.names import (
    DAMAGED,
    DEAD_PREFIX,
    MANIFEST,
    ON_HOLD,
    is_checkpoint_file,
    parse_attempt_name,
)
from engine.storage.base import Heads, Storage

Status = Literal["committed", "partial", "damaged"]

_STORE_THREADS = 16


@dataclass(frozen=True, slots=True)
class Listed:
    """One attempt in a checkpoint directory.

    `record` is set whenever the manifest can be read, damaged or not. `bytes` is the size of its files.
    `reason`: a sentence why it is not committed. `on_hold`: exempt from retention by command. `link`: the
    target if it is a symbolic link: a name in this directory, or a path.
    """

    id: str
    status: Status
    record: CheckpointRecord | None
    bytes: int
    reason: str = ""
    on_hold: bool = False
    link: str = ""

    @property
    def step(self) -> int | None:
        """The step; without a manifest, from the directory's name."""
        if self.record is not None:
            return self.record.step
        named = parse_attempt_name(self.id.removeprefix(DEAD_PREFIX))
        return named[0] if named else None


Memory = dict[str, tuple[dict[str, int], Listed]]
"""By directory, the names and sizes of its files and its listing: for committed checkpoints, which never
change. A caller that lists repeatedly, as clean-up does after each save, then reads only new manifests."""


class Directory:
    """One listing of a checkpoint directory. Its manifests are read on demand, each once.

    NotFoundError if there is no such directory; StorageError if it cannot be listed.

    Args:
        memory: what earlier listings of this storage read; it is updated. Not for callers that look for
            damage: a manifest whose bytes have changed since is not read again.
        heads: the listing, if the caller has one that is recent enough.
    Attributes:
        names: the attempts with a manifest.
        others: the attempts without one, and the abandoned ones.
    """

    def __init__(self, storage: Storage, memory: Memory | None = None, heads: Heads | None = None) -> None:
        if heads is None:
            heads = storage.list_heads()
        self._storage, self._whole = storage, heads.whole
        self._files = {
            name: files
            for name, files in heads.tree.items()
            if parse_attempt_name(name.removeprefix(DEAD_PREFIX)) is not None
        }
        self.names = [
            name
            for name, files in self._files.items()
            if MANIFEST in files and not name.startswith(DEAD_PREFIX)
        ]
        complete = set(self.names)
        self.others = [name for name in self._files if name not in complete]
        self._read: dict[str, Listed | None] = {}
        self._memory: Memory = {} if memory is None else memory
        for name in self._memory.keys() - self._files.keys():
            self._memory.pop(name, None)  # another thread may have removed it
        self._unmarked: dict[str, Listed] = {}
        """By name, the listing of a checkpoint with a damage mark as it would be without the mark."""
        self._explained: dict[str, Listed] = {}
        self._newest: Manifest | None = None
        self._lock = threading.Lock()

    def read(self, names: Collection[str]) -> list[Listed]:
        """These attempts, by sequence. One that was deleted since the listing is left out.

        A damage mark is not read: the attempt is listed as damaged, with reason "", until `explained`.
        """
        _each(self._storage, self._look_at, [name for name in names if name not in self._read])
        return sorted((item for name in names if (item := self._read[name]) is not None), key=_order)

    def explained(self, item: Listed) -> Listed:
        """The same, with the reason in its damage mark; or without the mark, if that no longer holds."""
        unmarked, known = self._unmarked.get(item.id), self._explained.get(item.id)
        if known is not None:
            return known
        if unmarked is None:
            return item
        mark = marks.read_damage_mark(self._storage, item.id)
        found = replace(item, reason=mark.reason) if mark.holds else unmarked
        with self._lock:
            self._read[item.id] = self._explained[item.id] = found
        return found

    def everything(self) -> list[Listed]:
        """Every attempt, explained, by sequence; those without a readable manifest last."""
        found: list[Listed | None] = []
        found += _each(self._storage, self.explained, self.read(self.names))
        found += _each(self._storage, self._unfinished, self.others)
        return sorted((item for item in found if item is not None), key=_order)

    def is_current(self) -> bool:
        """Whether the directory still has these checkpoints and no others. Does not notice new damage.

        It lists only the names, which is cheaper than a full listing.
        """
        try:
            names = {entry.name for entry in self._storage.list_dir() if entry.is_dir}
        except NotFoundError:
            return False
        others = [name for name in names - set(self.names) if parse_attempt_name(name) is not None]
        return names >= set(self.names) and not any(
            self._storage.exists(f"{name}/{MANIFEST}") for name in others
        )

    def manifest(self, name: str) -> Manifest:
        """The manifest of a committed checkpoint. The newest one read so far is cached."""
        newest = self._newest
        return newest if newest is not None and newest.id == name else read_manifest(self._storage, name)

    def _look_at(self, name: str) -> None:
        files, known = self._memory.get(name, ({}, None))
        if known is not None and files == self._files[name]:
            self._read[name] = known
            return
        files = self._files[name]
        marked = DAMAGED in files
        files = {file: size for file, size in files.items() if file != DAMAGED}
        item, manifest = _with_manifest(self._storage, name, files, self._whole)
        if item is not None and (link := self._storage.link_target(name)) is not None:
            item = replace(item, link=link)
        # A directory with another checkpoint's manifest stays damaged without the mark.
        if marked and item is not None and manifest is not None and manifest.id == name:
            self._unmarked[name] = item
            item = replace(item, status="damaged", reason="")
        with self._lock:
            self._read[name] = item
            if manifest is None or item is None or item.status != "committed":
                return
            self._memory[name] = (self._files[name], item)
            # Only one is cached: they can be large.
            if self._newest is None or _age(manifest) > _age(self._newest):
                self._newest = manifest

    def _unfinished(self, name: str) -> Listed | None:
        return _without_manifest(self._storage, name, self._files[name], self._whole)


def list_checkpoints(
    storage: Storage, memory: Memory | None = None, heads: Heads | None = None
) -> list[Listed]:
    """Every attempt, by sequence; those without a readable manifest last. Other directories are ignored.

    `memory`, `heads`: see `Directory`. A file whose size differs from the manifest's makes it damaged, where
    the listing includes sizes: always on a disk, seldom on a store. Only `verify` finds changed bytes.
    NotFoundError if there is no such directory; StorageError if it cannot be listed.
    """
    return Directory(storage, memory, heads).everything()


def committed(listed: Iterable[Listed]) -> list[CheckpointRecord]:
    """The records of committed checkpoints, oldest first: the input of selectors and retention."""
    return [item.record for item in listed if item.status == "committed" and item.record is not None]


def exempt_ids(listed: Sequence[Listed]) -> dict[str, str]:
    """Ids that retention leaves alone, and why: checkpoints on hold, and links with their targets."""
    found: dict[str, str] = {}
    for item in listed:
        if item.link:
            found |= {item.link: f"{item.id} links to it", item.id: "a symbolic link"}
    return found | {item.id: "held" for item in listed if item.on_hold}


def highest_sequence(listed: Iterable[Listed]) -> int:
    """The highest commit number in the directory, damaged checkpoints included; 0 without any."""
    return max((item.record.sequence for item in listed if item.record is not None), default=0)


def is_checkpoint_dir(storage: Storage) -> bool:
    """Whether the storage's root is itself a checkpoint, not a directory of checkpoints."""
    return storage.exists(MANIFEST)


def read_manifest(storage: Storage, id: str) -> Manifest:
    """The manifest of the checkpoint in the directory `id`.

    NotFoundError if it was never committed or has been deleted; DamagedError; NewerFormatError.
    """
    return _manifest(storage, id)[0]


def read_index(storage: Storage, manifest: Manifest, rank: int, *, name: str | None = None) -> ShardIndex:
    """The index of one rank's shards, checked against the manifest's receipt.

    `name`: the checkpoint's directory, if that is not the manifest's id. DamagedError unless it is the index
    that was written for this checkpoint; NotFoundError if it is missing.
    """
    receipt = manifest.shards[rank]
    path = f"{name or manifest.id}/{receipt.index.file}"
    what = storage.describe(path)
    raw = storage.read_bytes(path, max_bytes=MAX_BYTES)
    if len(raw) != receipt.index.bytes:
        raise DamagedError(f"{what} has {len(raw)} bytes: {receipt.index.bytes} were written")
    found = bytes_digest(raw)
    if found != receipt.index.digest:
        raise DamagedError(f"{what} has changed: its digest is {found}, not {receipt.index.digest}")
    index = ShardIndex.from_bytes(raw, what=what)
    if (index.attempt, index.rank, index.world_size) != (manifest.id, rank, manifest.world_size):
        raise DamagedError(
            f"{what} belongs to rank {index.rank} of {index.world_size} of {index.attempt}, "
            f"not to rank {rank} of {manifest.world_size} of {manifest.id}"
        )
    described = tuple((shard.file, shard.file_bytes, shard.digest) for shard in index.files)
    if described != tuple((file.file, file.bytes, file.digest) for file in receipt.files):
        raise DamagedError(f"{what} describes other shard files than the manifest does")
    return index


def _manifest(storage: Storage, name: str) -> tuple[Manifest, bytes]:
    path = f"{name}/{MANIFEST}"
    raw = storage.read_bytes(path, max_bytes=MAX_BYTES)
    return Manifest.from_bytes(raw, what=storage.describe(path)), raw


def _with_manifest(
    storage: Storage, name: str, files: dict[str, int], whole: bool
) -> tuple[Listed | None, Manifest | None]:
    """List a directory with a manifest; also returns the manifest. None if it was deleted since."""
    on_hold, bytes = ON_HOLD in files, sum(files.values())
    try:
        manifest, raw = _manifest(storage, name)
    except NotFoundError:
        return None, None
    except DamagedError as error:
        return Listed(name, "damaged", None, bytes, str(error), on_hold), None
    record = from_manifest(manifest, storage.uri, name=name, manifest_digest=bytes_digest(raw))
    if not whole:
        bytes = record.bytes
    if manifest.id != name:
        reason = f"its manifest belongs to {manifest.id}: the directory is a copy or was renamed"
        return Listed(name, "damaged", record, bytes, reason, on_hold), manifest
    wrong = size_damage(manifest, files) if whole else []
    if wrong:
        reason = wrong[0].sentence + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        return Listed(name, "damaged", record, bytes, reason, on_hold), manifest
    return Listed(name, "committed", record, record.bytes, "", on_hold), manifest


def _without_manifest(storage: Storage, name: str, files: dict[str, int], whole: bool) -> Listed | None:
    reason = "no manifest: it is being written, or its run ended before the commit"
    if name.startswith(DEAD_PREFIX):
        reason = "abandoned: the run that was writing it lost the directory to another run"
    if not whole:
        try:
            files = {entry.name: entry.bytes or 0 for entry in storage.list_dir(name)}
        except NotFoundError:
            return None  # deleted since the listing
    if files and not any(map(is_checkpoint_file, files)):
        reason = "only files that Holdfast did not write: they are never deleted"
    return Listed(name, "partial", None, sum(files.values()), reason, ON_HOLD in files)


def _age(manifest: Manifest) -> tuple[int, str]:
    return manifest.sequence, manifest.id


def _order(item: Listed) -> tuple[int, int, str]:
    if item.record is not None:
        return 0, item.record.sequence, item.id
    return (1 if item.status == "damaged" else 2), 0, item.id


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def _each(storage: Storage, work: Callable[[_Item], _Result], items: list[_Item]) -> list[_Result]:
    """Apply `work` to each item; in parallel on a store, where each costs a round trip."""
    if storage.is_local or len(items) < 2:
        return [work(item) for item in items]
    from concurrent.futures import (
        ThreadPoolExecutor,  # imported late: it would slow down the start of a local listing
    )

    with ThreadPoolExecutor(min(_STORE_THREADS, len(items))) as pool:
        return list(pool.map(work, items))
