"""A committed checkpoint, opened for a long read: verifies every block, and survives local retention."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from engine.convert.tensors import row_spans
from engine.directory.listing import read_manifest
from engine.errors import NotFoundError
from engine.format.layout import Chunk
from engine.format.manifest import TensorInfo
from engine.geometry import Box, cut, intersect, whole, within
from engine.restore.chunk_locations import Indexes, LocatedChunks, locate_chunks
from engine.restore.load_plan import Slice
from engine.restore.read import read_slices
from engine.state.tensor_format import to_torch
from engine.storage.base import Reader, Storage

_SPARE_FILES = 64


class CheckpointTensors:
    """The tensors of one checkpoint, by their names in its manifest. A context manager.

    On a local directory, all shards are opened at the start: an open file can be read to its end, even if
    retention deletes the checkpoint meanwhile. A store cannot promise that: there the read ends with one
    error that says so.

    Raises: NotFoundError if it was deleted; DamagedError, also from `windows`; StorageError.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._readers = _HeldReaders(storage)
        try:
            with self._explained():
                self.manifest = read_manifest(storage, name)
                self.indexes = Indexes(storage, self.manifest, name).every()
                self.places: LocatedChunks = locate_chunks(self.manifest, self.indexes)
                if storage.is_local:
                    files = [file.file for index in self.indexes for file in index.files]
                    self._readers.hold([f"{name}/{file}" for file in files])
        except BaseException:
            self.close()
            raise

    @property
    def uri(self) -> str:
        """Printable address of the checkpoint."""
        return self._storage.describe(self._name)

    @property
    def name(self) -> str:
        """Name of the checkpoint's directory."""
        return self._name

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor, without aliases."""
        return self.manifest.tensors

    def windows(self, name: str) -> Iterator[torch.Tensor]:
        """Consecutive rows of a tensor; see `TensorSource`. `name` may be an alias."""
        name = self.manifest.aliases.get(name, name)
        info = self.infos[name]
        dtype = to_torch(info.dtype)
        for begin, end in row_spans(info.shape, dtype.itemsize):
            yield self._read(name, info.shape, dtype, begin, end)

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._readers.close()

    def __enter__(self) -> CheckpointTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, begin: int, end: int
    ) -> torch.Tensor:
        rows = cut(whole(shape), 0, begin, end - begin) if shape else whole(shape)
        out = torch.empty(rows.sizes, dtype=dtype)
        if not out.numel():
            return out
        slices = []
        for number, (_, placed) in enumerate(self.places[name]):
            piece = _slice(number, placed.chunk, rows, out)
            if piece is not None:
                slices.append(piece)
        with self._explained():
            # Reading uses only the storage's open files and their names.
            read_slices(cast(Storage, self._readers), self._name, slices, self.places)
        return out

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except NotFoundError as error:
            raise NotFoundError(
                f"{self.uri} does not exist, or was deleted while it was read ({error}): put a checkpoint on "
                "hold before a long read (`python -m engine.checkpoints hold`), then start again"
            ) from error


class _HeldReaders:
    """A storage's readers, each opened once and kept open."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._held: dict[str, Reader] = {}

    def hold(self, paths: list[str]) -> None:
        """Open these files now."""
        _allow_open_files(len(paths) + _SPARE_FILES)
        for path in paths:
            self._held[path] = self._storage.open_reader(path)

    @contextlib.contextmanager
    def open_reader(self, path: str) -> Iterator[Reader]:
        """The reader of a file; it stays open when the context ends."""
        if path not in self._held:
            self._held[path] = self._storage.open_reader(path)
        yield self._held[path]

    def describe(self, path: str) -> str:
        return self._storage.describe(path)

    def close(self) -> None:
        for reader in self._held.values():
            reader.close()
        self._held.clear()


def _allow_open_files(count: int) -> None:
    """Raise this process's limit as far as allowed; beyond that, opening fails with its own error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _slice(number: int, chunk: Chunk, rows: Box, out: torch.Tensor) -> Slice | None:
    """The part of a chunk inside `rows`, with its place in `out`; None if they do not overlap."""
    shared = intersect(chunk, rows)
    if shared is None:
        return None
    spans = zip(within(shared, rows), shared.sizes, strict=True)
    part: Any = tuple(slice(begin, begin + length) for begin, length in spans)
    return Slice(chunk.name, number, within(shared, chunk), shared.sizes, out[part] if part else out)
