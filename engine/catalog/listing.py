"""What a checkpoint directory holds: every attempt in it, committed, partial or damaged.

One pass lists the directories; then each manifest is read. On a store, whose listings come in pages, that
pass leaves the shards out, and whether they have their full size only `verify` looks at. A listing that
fails raises: an outage is never taken for an empty directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from engine.catalog import marks
from engine.catalog.damage import size_damage
from engine.catalog.record import CheckpointRecord, from_manifest
from engine.errors import DamagedError, NotFoundError
from engine.format.digest import bytes_digest
from engine.format.index import ShardIndex
from engine.format.json import MAX_BYTES
from engine.format.manifest import Manifest
from engine.format.names import DAMAGED, DEAD_PREFIX, HELD, MANIFEST, parse_attempt_name
from engine.storage.base import Storage

Status = Literal["committed", "partial", "damaged"]

_STORE_THREADS = 16


@dataclass(frozen=True, slots=True)
class Listed:
    """One attempt in a checkpoint directory.

    `record` is set for every one whose manifest can be read, damaged or not. `bytes` is what lies there.
    `reason` says in a sentence why it is not committed. `held`: exempted from retention by hand.
    """

    id: str
    status: Status
    record: CheckpointRecord | None
    bytes: int
    reason: str = ""
    held: bool = False

    @property
    def step(self) -> int | None:
        """The step, from the directory's name where there is no manifest to ask."""
        if self.record is not None:
            return self.record.step
        named = parse_attempt_name(self.id.removeprefix(DEAD_PREFIX))
        return named[0] if named else None


def list_checkpoints(storage: Storage) -> list[Listed]:
    """Every attempt, by sequence; those without a readable manifest last. Other directories are ignored.

    A file's size that differs from the manifest's shows as damaged where the listing tells sizes: always on
    a disk, seldom on a store. Changed bytes only `verify` finds.
    NotFoundError when there is no such directory; StorageError when it cannot be listed.
    """
    heads = storage.list_heads()
    tree = {
        name: files
        for name, files in heads.tree.items()
        if parse_attempt_name(name.removeprefix(DEAD_PREFIX)) is not None
    }
    committed = [name for name in tree if MANIFEST in tree[name] and not name.startswith(DEAD_PREFIX)]
    others = [name for name in tree if name not in set(committed)]
    found = _each(storage, lambda name: _with_manifest(storage, name, tree[name], heads.whole), committed)
    found += _each(storage, lambda name: _without_manifest(storage, name, tree[name], heads.whole), others)
    return sorted((item for item in found if item is not None), key=_order)


def committed(listed: Iterable[Listed]) -> list[CheckpointRecord]:
    """The records that selectors and retention may see, oldest first."""
    return [item.record for item in listed if item.status == "committed" and item.record is not None]


def highest_sequence(listed: Iterable[Listed]) -> int:
    """The highest commit number in the directory, damaged checkpoints included; 0 when there is none."""
    return max((item.record.sequence for item in listed if item.record is not None), default=0)


def is_checkpoint_dir(storage: Storage) -> bool:
    """Whether the storage's root is itself one checkpoint rather than a directory of them."""
    return storage.exists(MANIFEST)


def read_manifest(storage: Storage, id: str) -> Manifest:
    """The manifest of the checkpoint in the directory `id`.

    NotFoundError when it was never committed or has been retired; DamagedError when it is not what was
    written; NewerFormatError.
    """
    return _manifest(storage, id)[0]


def read_index(storage: Storage, manifest: Manifest, rank: int, *, name: str | None = None) -> ShardIndex:
    """The index of one rank's shards, checked against the manifest's receipt.

    `name`: the checkpoint's directory where that is not the manifest's id. DamagedError unless the index is
    the one that was written for this checkpoint; NotFoundError when it is gone.
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


def _with_manifest(storage: Storage, name: str, files: dict[str, int], whole: bool) -> Listed | None:
    """What to say of a directory with a manifest; None when it was retired since the listing."""
    held, bytes = HELD in files, sum(files.values())
    try:
        manifest, raw = _manifest(storage, name)
    except NotFoundError:
        return None
    except DamagedError as error:
        return Listed(name, "damaged", None, bytes, str(error), held)
    record = from_manifest(manifest, storage.uri, name=name, raw=raw)
    if not whole:
        bytes = record.bytes
    if manifest.id != name:
        reason = f"its manifest is that of {manifest.id}: the directory is a copy or was renamed"
        return Listed(name, "damaged", record, bytes, reason, held)
    if DAMAGED in files:
        return Listed(name, "damaged", record, bytes, marks.damage_reason(storage, name), held)
    wrong = size_damage(manifest, files) if whole else []
    if wrong:
        reason = wrong[0].sentence + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        return Listed(name, "damaged", record, bytes, reason, held)
    return Listed(name, "committed", record, record.bytes, "", held)


def _without_manifest(storage: Storage, name: str, files: dict[str, int], whole: bool) -> Listed | None:
    reason = "no manifest: it is being written, or its run ended before the commit"
    if name.startswith(DEAD_PREFIX):
        reason = "abandoned: the run that was writing it has lost the directory"
    if not whole:
        try:
            files = {entry.name: entry.bytes or 0 for entry in storage.list_dir(name)}
        except NotFoundError:
            return None  # removed since the listing
    return Listed(name, "partial", None, sum(files.values()), reason, HELD in files)


def _order(item: Listed) -> tuple[int, int, str]:
    if item.record is not None:
        return 0, item.record.sequence, item.id
    return (1 if item.status == "damaged" else 2), 0, item.id


_Result = TypeVar("_Result")


def _each(storage: Storage, work: Callable[[str], _Result], names: list[str]) -> list[_Result]:
    """Apply `work` to each name: side by side on a store, where each is a round trip."""
    if storage.is_local or len(names) < 2:
        return [work(name) for name in names]
    from concurrent.futures import ThreadPoolExecutor  # costs start-up time that a local listing need not pay

    with ThreadPoolExecutor(min(_STORE_THREADS, len(names))) as pool:
        return list(pool.map(work, names))
