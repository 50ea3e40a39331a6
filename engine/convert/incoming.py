"""A foreign checkpoint, whatever its format: a tree of values and tensor references, and the tensors.

The formats are told apart by what lies there, not by what a flag says. Foreign files are read from the local
file system: what lies in a store is fetched first.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.convert.dcp_in import open_dcp
from engine.convert.pt_in import open_pt
from engine.convert.safetensors_in import open_safetensors
from engine.convert.safetensors_out import INDEX, SINGLE
from engine.convert.tensors import Progress, TensorSource, ignore_progress
from engine.dcp.stock_read import METADATA
from engine.errors import ConfigError, NotFoundError
from engine.format.names import MANIFEST
from engine.storage.base import Storage
from engine.storage.failures import mapped
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from engine.storage.redact import redact_uri
from engine.storage.split import split_uri

Kind = Literal["safetensors", "dcp", "pt"]

_FETCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Incoming:
    """What was found. In `tree`, tensors are `TensorRef`s by their names in `tensors`."""

    kind: Kind
    what: str
    tree: Mapping[str, Any]
    tensors: TensorSource


@contextlib.contextmanager
def incoming(
    address: str,
    *,
    options: Mapping[str, str] | None = None,
    trust_pickle: bool = False,
    progress: Progress = ignore_progress,
) -> Iterator[Incoming]:
    """Open a safetensors file or directory, a stock DCP directory, or a `.pt`, by path or URI.

    Raises: ConfigError when it is none of these; NotFoundError; DamagedError; StateError when loading it
        would run code and `trust_pickle` is not given; StorageError.
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


def kind_of(path: Path) -> Kind:
    """Which format lies there. ConfigError for none; NotFoundError for nothing."""
    if not path.exists():
        raise NotFoundError(f"nothing lies at {path}: check the path")
    if not path.is_dir():
        return "safetensors" if path.suffix == ".safetensors" else "pt"
    if (path / MANIFEST).exists():
        raise ConfigError(f"{path} is a Holdfast checkpoint already: there is nothing to import")
    if (path / METADATA).exists():
        return "dcp"
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return "safetensors"
    if len(list(path.glob("*.pt"))) == 1:
        return "pt"
    raise ConfigError(
        f"{path} is no checkpoint that can be imported: it has neither {SINGLE}, nor DCP's {METADATA}, nor "
        "one .pt file. Give such a directory, a .safetensors file or a .pt file"
    )


def _open(path: Path, what: str, trust_pickle: bool) -> Incoming:
    kind = kind_of(path)
    tensors: TensorSource
    if kind == "safetensors":
        tree, tensors = open_safetensors(path)
    elif kind == "dcp":
        tree, tensors = open_dcp(path, trust_pickle=trust_pickle)
    else:
        file = next(path.glob("*.pt")) if path.is_dir() else path
        tree, tensors = open_pt(file, trust_pickle=trust_pickle)
    return Incoming(kind, what, tree, tensors)


def _fetch(storage: Storage, name: str, path: Path, progress: Progress) -> None:
    """Copy a file, or a directory with its files, out of a store."""
    try:
        storage.size(name)
    except NotFoundError:
        path.mkdir()
        for entry in storage.list_dir(name):
            if not entry.is_dir:
                _fetch_file(storage, f"{name}/{entry.name}", path / entry.name, progress)
    else:
        _fetch_file(storage, name, path, progress)


def _fetch_file(storage: Storage, name: str, path: Path, progress: Progress) -> None:
    buffer = bytearray(_FETCH_BYTES)
    with storage.open_reader(name) as reader, mapped("write", str(path)), open(path, "wb") as file:
        for begin in range(0, reader.file_bytes, _FETCH_BYTES):
            view = memoryview(buffer)[: min(_FETCH_BYTES, reader.file_bytes - begin)]
            reader.read_into(begin, view)
            file.write(view)
            progress(len(view))
