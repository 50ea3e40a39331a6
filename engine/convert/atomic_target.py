"""Writes a target atomically: it appears complete or not at all.

On a local file system everything is written beside the target, synced, and renamed. A store cannot rename:
there everything is written to a local temporary directory and then uploaded, and after a failed upload the
uploaded files are deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.convert.tensors import Progress, ignore_progress
from engine.errors import AlreadyExistsError, HoldfastError
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from engine.storage.os_failures import mapped
from engine.storage.reader_source import ReaderSource
from engine.storage.uris import split_uri

log = logging.getLogger(__name__)


@contextlib.contextmanager
def staged(
    target: str,
    options: Mapping[str, str] | None = None,
    *,
    last: str = "",
    progress: Progress = ignore_progress,
) -> Iterator[Path]:
    """A path at which to write a file or directory; it becomes `target` when the block ends without an error.

    `target` is a path or URI that does not exist, or an empty local directory. `last` names the file that
    makes a directory valid: it is uploaded after all others. Raises: AlreadyExistsError; StorageError.
    """
    parent, name = split_uri(target)
    storage = open_storage(parent, options)
    _refuse_taken(storage, name)
    if storage.is_local:
        with _beside(storage, name) as path:
            yield path
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        path = Path(folder) / name
        with mapped("write", str(path)):
            yield path
        _upload(storage, path, name, last, progress)


def _refuse_taken(storage: Storage, name: str) -> None:
    if not storage.exists(name):
        return
    where = storage.describe(name)
    if storage.is_local and os.path.isdir(where) and not os.listdir(where):
        return
    raise AlreadyExistsError(
        f"{where} exists already and is not overwritten: remove it, or choose another name"
    )


@contextlib.contextmanager
def _beside(storage: Storage, name: str) -> Iterator[Path]:
    storage.make_dir()
    temporary = f".{name[:200]}.{secrets.token_hex(4)}.tmp"
    path = Path(storage.describe(temporary))
    target = storage.describe(name)
    try:
        with mapped("write", target):
            yield path
            _sync(path)
            if os.path.isdir(target):
                os.rmdir(target)  # it was empty; if it is not any more, this raises
        storage.rename(temporary, name)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink() if path.is_file() else storage.delete_tree(temporary)
        raise


def _sync(path: Path) -> None:
    """Make a file, or a directory with its files, durable."""
    for found in [*path.iterdir(), path] if path.is_dir() else [path]:
        fd = os.open(found, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _upload(storage: Storage, path: Path, name: str, last: str, progress: Progress) -> None:
    files = [(path, name)]
    if path.is_dir():
        ordered = sorted(path.iterdir(), key=lambda file: (file.name == last, file.name))
        files = [(file, f"{name}/{file.name}") for file in ordered]
    done: list[str] = []
    try:
        for file, to in files:
            done.append(to)
            _put(storage, file, to, progress)
    except BaseException:
        for to in done:
            try:
                storage.delete_file(to)
            except HoldfastError as problem:
                log.warning("%s could not be deleted: %s", storage.describe(to), problem)
        raise


def _put(storage: Storage, file: Path, to: str, progress: Progress) -> None:
    with LocalStorage(file.parent).open_reader(file.name) as reader:
        storage.write_shard(to, ReaderSource(reader, lambda begin, view: progress(len(view))))
