"""Copy one committed checkpoint to another storage: verified when read and on arrival, and resumable.

    shard files, indexes      each sent, read back and compared with its digests
    manifest.json             last, byte for byte the source's: the commit, as after a save

A file that the target already has intact is not sent again. Intact means read and compared: an overwritten or
decayed file may still have the right size.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from engine.directory import marks
from engine.directory.damage import size_damage
from engine.directory.listing import read_index, read_manifest
from engine.errors import AlreadyExistsError, DamagedError, NewerFormatError, NotFoundError, StorageError
from engine.format.digest import bytes_digest
from engine.format.index import ShardFile, ShardIndex
from engine.format.json import MAX_BYTES
from engine.format.manifest import FileReceipt, Manifest
from engine.format.names import DAMAGED, DEAD_PREFIX, MANIFEST
from engine.lease.lease import Lease
from engine.mirror.verified_source import Progress, verified, verify_file
from engine.storage.base import Storage
from engine.storage.confirm import is_as_written, loses_data

log = logging.getLogger(__name__)

SEND_TRIES = 3
"""How often a file is sent if it does not arrive as it was sent."""


class Cancelled(Exception):
    """The copy was asked to stop. Not an error: files that have arrived stay, and the next copy resumes."""


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of a copy. Only `sent_bytes` of the checkpoint's `bytes` had to be sent."""

    id: str
    path: str
    step: int
    bytes: int
    sent_bytes: int
    secs: float


def copy_checkpoint(
    source: Storage,
    name: str,
    target: Storage,
    *,
    lease: Lease | None = None,
    check: bool = False,
    progress: Progress = lambda count: None,
    cancel: threading.Event | None = None,
) -> Copied:
    """Copy the committed checkpoint in the directory `name` of `source` to `target`, or repair its copy.

    Args:
        lease: the lease on `target`, checked before the commit.
        check: read and compare a copy that is already committed; otherwise only its sizes are checked.
        progress: counts each byte at most twice: when it is read to be sent, and when it has arrived.
        cancel: once set, the copy stops with Cancelled.
    Raises: NotFoundError if the source is not a committed checkpoint, or is deleted meanwhile; DamagedError
        if it is damaged; AlreadyExistsError if another checkpoint has its name; LeaseLostError; StorageError.
    """
    return _Copy(source, name, target, lease, check, progress, cancel).run()


class _Copy:
    def __init__(
        self,
        source: Storage,
        name: str,
        target: Storage,
        lease: Lease | None,
        check: bool,
        progress: Progress,
        cancel: threading.Event | None,
    ) -> None:
        self._source, self._name, self._target = source, name, target
        self._lease, self._check, self._progress, self._cancel = lease, check, progress, cancel
        self._sent_bytes = 0
        self._marked = False

    def run(self) -> Copied:
        begun = time.monotonic()
        raw = self._source.read_bytes(f"{self._name}/{MANIFEST}", max_bytes=MAX_BYTES)
        manifest = Manifest.from_bytes(raw, what=self._source.describe(f"{self._name}/{MANIFEST}"))
        unfence(self._target, manifest.id)
        there = self._files(manifest.id)
        committed = MANIFEST in there and self._has_our_manifest(manifest.id, raw)
        whole = committed and DAMAGED not in there and not size_damage(manifest, there)
        if not whole or self._check:
            self._send_files(manifest, there, committed)
            marked = self._marked or DAMAGED in there
            if marked and not committed:
                self._target.delete_file(f"{manifest.id}/{DAMAGED}")
            if not committed:
                self._publish(manifest.id, raw)
            elif marked:  # last: until then it is listed as damaged
                self._target.delete_file(f"{manifest.id}/{DAMAGED}")
                self._target.sync_dir(manifest.id)
        return Copied(
            id=manifest.id,
            path=self._target.describe(manifest.id),
            step=manifest.step,
            bytes=manifest.total_bytes,
            sent_bytes=self._sent_bytes,
            secs=time.monotonic() - begun,
        )

    def _files(self, id: str) -> dict[str, int]:
        try:
            return {entry.name: entry.bytes or 0 for entry in self._target.list_dir(id) if not entry.is_dir}
        except NotFoundError:
            return {}

    def _has_our_manifest(self, id: str, raw: bytes) -> bool:
        """Whether the target has the same manifest. A damaged one there is deleted."""
        path = f"{id}/{MANIFEST}"
        try:
            if self._target.read_bytes(path, max_bytes=MAX_BYTES) == raw:
                return True
            read_manifest(self._target, id)
        except NotFoundError:
            return False
        except NewerFormatError:
            pass
        except DamagedError as error:
            log.warning("%s: sending it again", error)
            self._target.delete_file(path)
            self._target.sync_dir(id)
            return False
        raise AlreadyExistsError(
            f"{self._target.describe(id)} is a different checkpoint with the same name, and was not changed. "
            "Copy to another directory"
        )

    def _send_files(self, manifest: Manifest, there: Mapping[str, int], committed: bool) -> None:
        self._target.make_dir(manifest.id)
        for shard in manifest.shards:
            index = read_index(self._source, manifest, shard.rank, name=self._name)
            for file in index.files:
                self._send_shard(manifest.id, file, there, committed)
            self._send_index(manifest.id, index, shard.index, there, committed)
        ours = {receipt.file for shard in manifest.shards for receipt in (*shard.files, shard.index)}
        # Other readers would read any further shard in the directory as part of the checkpoint.
        for damage in size_damage(manifest, {**there, **dict.fromkeys(ours, 0)}):
            if damage.file not in ours:
                self._before_change(manifest.id, committed)
                self._target.delete_file(f"{manifest.id}/{damage.file}")
        self._target.sync_dir(manifest.id)

    def _send_shard(self, id: str, file: ShardFile, there: Mapping[str, int], committed: bool) -> None:
        path = f"{id}/{file.file}"
        if there.get(file.file) == file.file_bytes and self._read_back(path, file) is None:
            return
        self._before_change(id, committed)
        if file.file in there:
            self._target.delete_file(path)
        problem: DamagedError | None = None
        for _ in range(SEND_TRIES):
            if problem is not None:
                log.warning("%s changed on the way, sending it again: %s", path, problem)
                self._target.delete_file(path)
            with verified(self._source, f"{self._name}/{file.file}", file, self._advance) as source:
                self._target.write_shard(path, source)
            self._sent_bytes += file.file_bytes
            problem = self._read_back(path, file)
            if problem is None:
                return
        raise StorageError(
            f"{self._target.describe(path)} was sent {SEND_TRIES} times, and changed on the way each time "
            f"({problem}): this storage or the network on the way changes data. Test it with "
            "`python -m engine.checkpoints selftest`"
        )

    def _read_back(self, path: str, file: ShardFile) -> DamagedError | None:
        """Read a file of the target and compare it. Returns the damage, if any."""
        try:
            verify_file(self._target, path, file, self._advance)
        except NotFoundError:
            return DamagedError("it is missing")
        except DamagedError as error:
            return error
        return None

    def _send_index(
        self, id: str, index: ShardIndex, receipt: FileReceipt, there: Mapping[str, int], committed: bool
    ) -> None:
        path, raw = f"{id}/{receipt.file}", index.to_bytes()
        assert bytes_digest(raw) == receipt.digest, "an index has one serialisation only"
        if receipt.file in there and self._is_as_written(path, raw):
            return
        self._before_change(id, committed)
        self._target.write_file(path, raw)
        self._sent_bytes += len(raw)
        self._confirm(path, raw)

    def _is_as_written(self, path: str, raw: bytes) -> bool:
        self._advance(len(raw))
        return is_as_written(self._target, path, raw)

    def _confirm(self, path: str, raw: bytes) -> None:
        if not self._is_as_written(path, raw):
            raise StorageError(loses_data(self._target, path))

    def _before_change(self, id: str, committed: bool) -> None:
        """Mark a committed checkpoint as damaged until it is repaired."""
        if committed and not self._marked:
            self._marked = True
            if self._lease is not None:
                self._lease.check()
            log.warning("%s is damaged: sending it again", self._target.describe(id))
            marks.mark_damaged(
                self._target, id, "its files differ from the source; they are being sent again"
            )

    def _publish(self, id: str, raw: bytes) -> None:
        """Commit the source's manifest, byte for byte: equal digests mean the same checkpoint."""
        path = f"{id}/{MANIFEST}"
        self._advance(0)
        if self._lease is not None:
            self._lease.check()
        # It may exist: an earlier answer was lost, or another copy was faster. `_confirm` compares it.
        with contextlib.suppress(AlreadyExistsError):
            self._target.publish(path, raw, exclusive=True)
        self._confirm(path, raw)

    def _advance(self, count: int) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled
        self._progress(count)


def unfence(storage: Storage, id: str) -> None:
    """Rename an attempt that a new lease holder has fenced back: its files may be intact.

    If its earlier sender still runs, it sends the same bytes, and cannot commit without the lease.
    """
    dead = DEAD_PREFIX + id
    if not storage.is_local:  # stores cannot rename, so nothing was fenced
        return
    if storage.exists(dead) and not storage.exists(id):
        with contextlib.suppress(NotFoundError, AlreadyExistsError):
            storage.rename(dead, id)
