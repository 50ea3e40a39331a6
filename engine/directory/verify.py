"""Verify a checkpoint against what was written: sizes, indexes, headers and, unless quick, every block."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.directory.damage import Damage, coverage_damage, size_damage
from engine.directory.listing import read_index, read_manifest
from engine.errors import DamagedError, NewerFormatError, NotFoundError
from engine.format.digest import DIGEST_BYTES, block_digests, expected_digest
from engine.format.index import ShardFile, ShardIndex
from engine.format.layout import header_bytes, parse_header
from engine.format.manifest import Manifest
from engine.format.names import MANIFEST
from engine.storage.base import Storage

WINDOW_BYTES = 8 << 20
"""Bytes that one thread reads at a time."""

MAX_BLOCKS_NAMED = 16
"""How many damaged blocks of one file are reported one by one; an overwritten file has tens of thousands."""

_BATCH = 16
_FIRST_BYTES = 8

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of a verification. `bytes` were read and compared, in `secs`."""

    id: str
    ok: bool
    damage: tuple[Damage, ...]
    bytes: int
    secs: float


def verify_checkpoint(
    storage: Storage,
    id: str,
    *,
    quick: bool = False,
    progress: Progress | None = None,
    threads: int = 2,
    clock: Callable[[], float] = time.monotonic,
) -> VerifyResult:
    """Verify one checkpoint. Damage is returned, not raised, in the order of ranks and blocks.

    `quick` skips the blocks, and checks sizes, indexes, headers and that the chunks cover every tensor.
    `progress` is called with the number of bytes checked since the last call, by one thread at a time.
    NotFoundError if the checkpoint was never committed or is deleted meanwhile; NewerFormatError if this
    Holdfast cannot read it; StorageError if the storage fails.
    """
    return _Verification(storage, id, quick, progress, clock).run(threads)


class _Verification:
    def __init__(
        self, storage: Storage, id: str, quick: bool, progress: Progress | None, clock: Callable[[], float]
    ) -> None:
        self._storage = storage
        self._id = id
        self._quick = quick
        self._progress = progress
        self._clock = clock
        self._lock = threading.Lock()
        self._buffers = threading.local()  # one per thread: to zero a new one costs as much as a read
        self._checked_bytes = 0

    def run(self, threads: int) -> VerifyResult:
        began = self._clock()
        try:
            damage = self._find_damage(threads)
        except NotFoundError:
            self._require_manifest()
            raise
        if damage:
            self._require_manifest()
        secs = self._clock() - began
        return VerifyResult(self._id, not damage, tuple(damage), self._checked_bytes, secs)

    def _find_damage(self, threads: int) -> list[Damage]:
        try:
            manifest = read_manifest(self._storage, self._id)
        except NewerFormatError:
            raise
        except DamagedError as error:
            return [_document_damage(MANIFEST, "the manifest as written", error)]
        files = {entry.name: entry.bytes for entry in self._storage.list_dir(self._id) if not entry.is_dir}
        damage = size_damage(manifest, files)
        broken = {item.file for item in damage}
        with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-verify") as pool:
            try:
                indexes = []
                ranks = range(manifest.world_size)
                for index, found in pool.map(lambda rank: self._shard(manifest, rank, broken), ranks):
                    damage += found
                    indexes += [index] if index is not None else []
                if len(indexes) == manifest.world_size:
                    damage += coverage_damage(manifest, indexes)
                if not self._quick:
                    shards = [s for index in indexes for s in index.files if s.file not in broken]
                    for shard in shards:
                        damage += self._blocks(shard, pool)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # an interrupt must not wait for the queue
                raise
        return damage

    def _require_manifest(self) -> None:
        if not self._storage.exists(f"{self._id}/{MANIFEST}"):
            raise NotFoundError(
                f"{self._storage.describe(self._id)} is not a committed checkpoint: it has no manifest, or "
                "was deleted during the verification"
            )

    def _shard(
        self, manifest: Manifest, rank: int, broken: set[str]
    ) -> tuple[ShardIndex | None, list[Damage]]:
        """One rank's index, and the damage of the index and of its files' headers."""
        file = manifest.shards[rank].index.file
        if file in broken:
            return None, []
        try:
            index = read_index(self._storage, manifest, rank, name=self._id)
        except NewerFormatError:
            raise
        except DamagedError as error:
            return None, [_document_damage(file, "the index as written", error)]
        self._count(manifest.shards[rank].index.bytes)
        whole = [shard for shard in index.files if shard.file not in broken]
        return index, [found for shard in whole for found in self._header(shard)]

    def _header(self, shard: ShardFile) -> Iterator[Damage]:
        """Compare a shard's own safetensors header with the index."""
        path = f"{self._id}/{shard.file}"
        raw = bytearray(_FIRST_BYTES)
        try:
            with self._storage.open_reader(path) as reader:
                reader.read_into(0, memoryview(raw))
                raw = bytearray(header_bytes(bytes(raw), shard.file_bytes, what=shard.file))
                reader.read_into(0, memoryview(raw))
            entries = parse_header(bytes(raw), shard.file_bytes, what=shard.file)
        except DamagedError as error:
            yield _document_damage(shard.file, "the header as written", error)
            return
        if self._quick:  # otherwise it is counted with the blocks
            self._count(len(raw))
        stored = {name: (e.dtype, e.sizes, e.begin, e.end) for name, e in entries.items()}
        indexed = {p.chunk.name: (p.chunk.dtype, p.chunk.sizes, p.begin, p.end) for p in shard.chunks}
        if stored != indexed:
            name = next(n for n in sorted({*stored, *indexed}) if stored.get(n) != indexed.get(n))
            expected, found = str(indexed.get(name, "absent")), str(stored.get(name, "absent"))
            sentence = f"the header of {shard.file} has {name!r} as {found}: its index says {expected}"
            yield Damage(shard.file, None, expected, found, sentence)

    def _blocks(self, shard: ShardFile, pool: ThreadPoolExecutor) -> list[Damage]:
        """Compare every block of a file with its digest."""
        window_bytes = max(1, WINDOW_BYTES // shard.block_bytes) * shard.block_bytes
        with self._storage.open_reader(f"{self._id}/{shard.file}") as reader:

            def differing(begin: int) -> list[tuple[int, bytes]]:
                view = self._buffer(window_bytes)[: shard.file_bytes - begin]
                reader.read_into(begin, view)
                found = block_digests(view, shard.block_bytes)
                self._count(len(view))
                return list(_differing(shard, begin // shard.block_bytes, found))

            bad: list[tuple[int, bytes]] = []
            try:
                for begins in _batches(range(0, shard.file_bytes, window_bytes)):
                    for found in pool.map(differing, begins):
                        bad += found
            except DamagedError as error:  # the file was shortened after it was listed
                return [_document_damage(shard.file, f"{shard.file_bytes} bytes", error)]
        named = [_block_damage(shard, block, digest) for block, digest in bad[:MAX_BLOCKS_NAMED]]
        if len(bad) > MAX_BLOCKS_NAMED:
            named.append(_further_damage(shard, len(bad) - MAX_BLOCKS_NAMED, len(bad)))
        return named

    def _buffer(self, window_bytes: int) -> memoryview:
        buffer: bytearray | None = getattr(self._buffers, "buffer", None)
        if buffer is None or len(buffer) < window_bytes:
            buffer = self._buffers.buffer = bytearray(window_bytes)
        return memoryview(buffer)[:window_bytes]

    def _count(self, checked_bytes: int) -> None:
        with self._lock:
            self._checked_bytes += checked_bytes
            if self._progress is not None:
                self._progress(checked_bytes)


def _batches(begins: range) -> Iterator[range]:
    """A few windows at a time, so that an error or interrupt ends the work soon in a file of any size."""
    return (begins[at : at + _BATCH] for at in range(0, len(begins), _BATCH))


def _differing(shard: ShardFile, first_block: int, found: bytes) -> Iterator[tuple[int, bytes]]:
    """(block, digest found) for each block whose digest differs from the recorded one."""
    begin = first_block * DIGEST_BYTES
    if shard.digests[begin : begin + len(found)] == found:
        return
    for at in range(0, len(found), DIGEST_BYTES):
        digest, block = found[at : at + DIGEST_BYTES], first_block + at // DIGEST_BYTES
        if digest != expected_digest(shard.digests, block):
            yield block, digest


def _document_damage(file: str, expected: str, error: DamagedError) -> Damage:
    return Damage(file, None, expected, str(error), str(error))


def _block_damage(shard: ShardFile, block: int, digest: bytes) -> Damage:
    expected, found = expected_digest(shard.digests, block).hex(), digest.hex()
    begin = block * shard.block_bytes
    end = min(begin + shard.block_bytes, shard.file_bytes)
    sentence = (
        f"{shard.file}: block {block} (bytes {begin} to {end}) has changed: "
        f"its digest is {found}, not {expected}"
    )
    return Damage(shard.file, block, expected, found, sentence)


def _further_damage(shard: ShardFile, more: int, total: int) -> Damage:
    blocks = len(shard.digests) // DIGEST_BYTES
    sentence = f"{shard.file}: {more} more blocks have changed, {total} of {blocks} in total"
    return Damage(shard.file, None, f"{blocks} intact blocks", f"{total} damaged blocks", sentence)
