"""Object stores and every other fsspec file system: s3, gs, az, memory, sftp, ..."""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    NotFoundError,
    StorageError,
    StorageUnavailableError,
)
from engine.format.names import TMP_SUFFIX, safe_relative
from engine.storage import objects
from engine.storage.base import Cleared, Entry, Heads, Reader, Storage, WriteStats
from engine.storage.client import StoreClient
from engine.storage.ranged import RangedReader
from engine.storage.remote_failures import InvalidRangeError
from engine.storage.retry import Retry
from engine.storage.source import Source
from engine.storage.upload import MAX_PUT_BYTES, upload

log = logging.getLogger(__name__)

_MEMORY_LOCK = threading.Lock()
"""fsspec's memory:// checks, then creates. Its whole world is this process, so a lock makes that one step."""


class FsspecStorage(Storage):
    """A prefix in a store that fsspec knows, or a directory behind a protocol like SFTP.

    `options` are the client's, see `options.client_options`. Constructing contacts nothing. ConfigError if
    the scheme is unknown or its package is not installed.
    """

    is_local = False
    durability = "an upload that returned is as durable as the store makes it; a partial one is never visible"

    def __init__(self, uri: str, options: Mapping[str, object], *, retry: Retry | None = None) -> None:
        self._client = StoreClient(uri, options, retry=retry)
        self._fs = self._client.fs
        self.uri = self._client.uri
        self._exclusive: bool | None = None
        self._probe_lock = threading.Lock()
        self._told_uploads = False

    @property
    def supports_exclusive_create(self) -> bool:
        with self._probe_lock:
            if self._exclusive is None:
                self._exclusive = self._probe_exclusive()
                verb = "honours" if self._exclusive else "does not honour"
                log.info("%s %s the precondition that an object does not exist", self.uri, verb)
            return self._exclusive

    def list_dir(self, path: str = "") -> list[Entry]:
        return objects.entries(self._client, path)

    def list_tree(self) -> dict[str, dict[str, int]]:
        tree: dict[str, dict[str, int]] = {"": {}}
        for relative, size in objects.files(self._client, ""):
            _place(tree, relative, size)
        return tree

    def list_heads(self) -> Heads:
        multipart, root = self._client.multipart, self._client.full("")
        names = self._client.do("list", "", lambda: multipart.names(root)) if multipart is not None else None
        if names is None:
            return Heads(self.list_tree(), whole=True)
        tree: dict[str, dict[str, int]] = {"": {}}
        for relative, size in names.files.items():
            _place(tree, relative, size)
        for directory in names.directories:
            if "/" not in directory:
                tree.setdefault(directory, {})
        return Heads(tree, whole=False)

    def unfinished_uploads(self) -> list[str]:
        return [path for path, _ in self._unfinished("")]

    def abort_uploads(self, path: str) -> None:
        multipart = self._client.multipart
        for name, id in self._unfinished(safe_relative(path)):
            assert multipart is not None
            full = self._client.full(name)
            with contextlib.suppress(NotFoundError):  # completed or aborted meanwhile
                self._client.do("abort", name, functools.partial(multipart.abort, full, id))

    def size(self, path: str) -> int:
        return self._client.size(safe_relative(path))

    def exists(self, path: str) -> bool:
        try:
            self._client.info(path)
        except NotFoundError:
            return False
        return True

    def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
        full = self._client.full(safe_relative(path))
        try:
            # One ranged request: asking for the size first would double the cost of reading a manifest.
            data = self._client.do("read", path, lambda: self._head_of(full, max_bytes + 1))
        except InvalidRangeError:
            return b""  # how S3 answers for an empty object
        if len(data) > max_bytes:
            raise DamagedError(f"{self.describe(path)} has more than the {max_bytes} bytes expected")
        return bytes(data)

    def open_reader(self, path: str) -> Reader:
        return RangedReader(self._client, safe_relative(path))

    def write_file(self, path: str, data: bytes) -> None:
        full = self._client.full(safe_relative(path))
        if self._client.is_object_store:
            self._client.do("write", path, lambda: self._put(full, data))
        else:
            self._client.do("write", path, lambda: self._replace(full, data))

    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        if len(data) > MAX_PUT_BYTES:
            raise StorageError(
                f"{self.describe(path)} has {len(data)} bytes, and at most {MAX_PUT_BYTES} appear at once:"
                " store less in shared objects and configuration"
            )
        if not exclusive:
            self.write_file(path, data)
        elif self.supports_exclusive_create:
            self._create(path, data)
        else:
            # No precondition to be had: the lease and the unique attempt path keep runs apart.
            self._refuse_taken(path)
            self.write_file(path, data)

    def write_shard(self, path: str, source: Source) -> WriteStats:
        self._refuse_taken(safe_relative(path))
        where = self.describe(path)
        begun = time.monotonic()
        try:
            upload(self._client, path, source)
            stored = self.size(path)
            if stored != source.file_bytes:
                raise StorageError(f"could not write {where}: of {source.file_bytes} bytes {stored} arrived")
        except BaseException:
            full = self._client.full(path)
            with contextlib.suppress(Exception):
                self._client.briefly("delete", path, lambda: self._client.call("rm_file", full))
            raise
        return WriteStats(source.file_bytes, time.monotonic() - begun, 0.0, "upload")

    def make_dir(self, path: str = "") -> None:
        full = self._client.full(path)
        if not self._client.is_object_store:
            self._client.do("create", path, lambda: self._fs.makedirs(full, exist_ok=True))
        elif not path:
            self.list_dir()  # a missing bucket or wrong credentials show here, before training starts

    def sync_dir(self, path: str = "") -> None:
        pass

    def rename(self, src: str, dst: str) -> bool:
        return False

    def delete_file(self, path: str) -> None:
        full = self._client.full(safe_relative(path))
        with contextlib.suppress(NotFoundError):
            self._client.do("delete", path, lambda: self._client.call("rm_file", full))

    def delete_tree(self, path: str) -> None:
        full = self._client.full(safe_relative(path))
        if not self._client.is_object_store:
            with contextlib.suppress(NotFoundError):
                self._client.do("delete", path, lambda: self._fs.rm(full, recursive=True))
            return
        self.abort_uploads(path)
        names = [f"{full}/{name}" for name, _ in objects.files(self._client, path)]
        if names:
            self._client.do("delete", path, lambda: objects.remove(self._client, names))
            objects.require_gone(self._client, path)

    def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
        self.abort_uploads(path)
        return objects.clear(self._client, path, ours)

    def versions(self, path: str) -> dict[str, str]:
        return objects.versions(self._client, path)

    def free_bytes(self) -> int | None:
        return None

    def _unfinished(self, path: str) -> list[tuple[str, str]]:
        """(path, id) of the uploads below a directory that somebody began and never ended."""
        multipart, root = self._client.multipart, self._client.full("")
        if multipart is None:
            return []
        below = self._client.full(path)
        try:
            found = self._client.do("list uploads below", path, lambda: multipart.unfinished(below))
        except StorageUnavailableError:
            raise
        except StorageError as error:
            # Some credentials may not list uploads; some stores have no such list. Deleting continues.
            if not self._told_uploads:
                self._told_uploads = True
                log.warning("unfinished uploads cannot be listed, so they stay: %s", error)
            return []
        return [(full[len(root) + 1 :], id) for full, id in found if full.startswith(f"{root}/")]

    def _replace(self, full: str, data: bytes) -> None:
        """For real file systems behind a protocol: a file under a temporary name, renamed."""
        temporary = f"{full}.{secrets.token_hex(4)}{TMP_SUFFIX}"
        try:
            self._fs.pipe_file(temporary, data)
            self._fs.mv(temporary, full)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(temporary)
            raise

    def _refuse_taken(self, path: str) -> None:
        if self.exists(path):
            raise AlreadyExistsError(f"could not write {self.describe(path)}: the name is taken already")

    def _create(self, path: str, data: bytes) -> None:
        full = self._client.full(safe_relative(path))
        tries = 0

        def put() -> None:
            nonlocal tries
            tries += 1
            self._put_new(full, data)

        try:
            self._client.do("write", path, put)
        except AlreadyExistsError:
            # After a failed try, that object may be ours: its answer was lost, not the request.
            if tries == 1 or self.read_bytes(path, max_bytes=MAX_PUT_BYTES) != data:
                raise

    def _head_of(self, full: str, size: int) -> Any:
        return self._client.call("cat_file", full, start=0, end=size)

    def _put(self, full: str, data: bytes, **how: str) -> None:
        self._client.call("pipe_file", full, data, moving_bytes=len(data), **how)

    def _put_new(self, full: str, data: bytes) -> None:
        lock: Any = _MEMORY_LOCK if self._client.scheme == "memory" else contextlib.nullcontext()
        with lock:
            self._put(full, data, mode="create")

    def _probe_exclusive(self) -> bool:
        """Whether a second create-only PUT of one name is refused, tried on an object of its own.

        Not one of the probes that a run which takes a directory over sweeps up: swept between the two
        PUTs, this one would say that the store ignores the precondition.
        """
        name = f"create-only-{secrets.token_hex(8)}{TMP_SUFFIX}"
        full = self._client.full(name)
        try:
            for _ in range(2):
                self._client.do("probe", name, lambda: self._put_new(full, b"probe"))
        except AlreadyExistsError:
            return True
        except ConfigError:
            return False  # the client does not know the mode at all
        except StorageError as error:
            if type(error) is not StorageError:
                raise
            return False  # a plain refusal, as of a header that is not implemented
        finally:
            with contextlib.suppress(Exception):
                self._client.call("rm_file", full)
        return False


def _place(tree: dict[str, dict[str, int]], relative: str, size: int) -> None:
    """Enter a file into a tree of one level; what lies deeper is left out."""
    directory, _, file = relative.partition("/")
    if not file:
        tree[""][directory] = size
    elif "/" not in file:
        tree.setdefault(directory, {})[file] = size
