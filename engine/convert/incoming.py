"""Opens a foreign checkpoint of any format: a tree of values and tensor references, and the tensors.

The contents determine the format, not a flag. Foreign files are read from the local file system: those in a
store are downloaded first.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.convert.directories import belongs, open_directory, open_file
from engine.convert.opened import Kind
from engine.convert.tensors import Progress, TensorSource, ignore_progress
from engine.errors import NotFoundError
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from engine.storage.os_failures import mapped
from engine.storage.redact import redact_uri
from engine.storage.uris import split_uri

_FETCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Incoming:
    """The opened checkpoint, see `Opened`; `what` names it in errors."""

    kind: Kind
    what: str
    tree: Mapping[str, Any]
    tensors: TensorSource
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = field(default=())


@contextlib.contextmanager
def incoming(
    address: str,
    *,
    options: Mapping[str, str] | None = None,
    trust_pickle: bool = False,
    progress: Progress = ignore_progress,
) -> Iterator[Incoming]:
    """Open a file or directory that another tool wrote, by path or URI.

    Raises: ConfigError if it is not supported; NotFoundError; DamagedError; StateError if loading it would
        run code and `trust_pickle` is not set, or if its tool must merge it first; StorageError.
    """
    parent, name = split_uri(address)
    storage = open_storage(parent, options)
    with contextlib.ExitStack() as stack:
        if storage.is_local:
            assert isinstance(storage, LocalStorage)
            path = Path(storage.root) / name
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-"))) / name
            _fetch(storage, name, path, progress)
        stack.enter_context(mapped("read", str(path)))
        yield _open(path, redact_uri(address), trust_pickle)


def _open(path: Path, what: str, trust_pickle: bool) -> Incoming:
    if not path.exists():
        raise NotFoundError(f"there is nothing at {path}: check the path")
    found = (open_directory if path.is_dir() else open_file)(path, trust_pickle)
    return Incoming(found.kind, what, found.tree, found.tensors, found.notes, found.left_out)


def _fetch(storage: Storage, name: str, path: Path, progress: Progress) -> None:
    """Download a file, or a directory with the subdirectories that belong to it, from a store."""
    try:
        storage.size(name)
    except NotFoundError:
        _fetch_directory(storage, name, path, progress)
    else:
        _fetch_file(storage, name, path, progress)


def _fetch_directory(storage: Storage, name: str, path: Path, progress: Progress) -> None:
    path.mkdir()
    entries = storage.list_dir(name)
    for entry in entries:
        if not entry.is_dir:
            _fetch_file(storage, f"{name}/{entry.name}", path / entry.name, progress)
    for entry in entries:
        inner = f"{name}/{entry.name}"
        if entry.is_dir and belongs(path, entry.name):
            _fetch_directory(storage, inner, path / entry.name, progress)
        elif entry.is_dir:
            # Only names matter here: a folder of checkpoints need not be downloaded to be recognised as one.
            (path / entry.name).mkdir()
            for other in storage.list_dir(inner):
                (path / entry.name / other.name).touch()


def _fetch_file(storage: Storage, name: str, path: Path, progress: Progress) -> None:
    buffer = bytearray(_FETCH_BYTES)
    with storage.open_reader(name) as reader, mapped("write", str(path)), open(path, "wb") as file:
        for begin in range(0, reader.file_bytes, _FETCH_BYTES):
            view = memoryview(buffer)[: min(_FETCH_BYTES, reader.file_bytes - begin)]
            reader.read_into(begin, view)
            file.write(view)
            progress(len(view))
