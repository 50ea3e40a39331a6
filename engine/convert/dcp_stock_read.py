"""Reads a stock DCP directory without running code from it.

Its `.metadata` is a pickle, which DCP itself loads with `pickle.load`. Here it may name only the classes of
DCP's own metadata, and values are loaded with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import collections
import io
import math
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from engine.errors import DamagedError, StateError
from engine.format.layout import Chunk
from engine.format.names import safe_relative
from engine.geometry import cover

METADATA = ".metadata"

_CLASSES: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        collections.OrderedDict,
        torch.Size,
    )
}
_PATHS = frozenset({"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"})
_STORAGE_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_MEMORY_FORMAT = ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")


class _Place:
    """The position of an item. This class replaces DCP's private `_StorageInfo` in the pickle."""

    relative_path: str = ""
    offset: int = 0
    length: int = 0
    transform_descriptors: Any = None


@dataclass(frozen=True, slots=True)
class StockTensor:
    """A tensor's dtype and global shape, and its saved boxes (offsets, sizes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Loader(Protocol):
    """Turns the bytes of one item into an object."""

    def __call__(self, raw: io.BytesIO) -> Any: ...


@dataclass(slots=True)
class StockDirectory:
    """The contents of a directory, by flattened name.

    paths: flattened name -> path in the saved nested state, if recorded.
    """

    folder: Path
    tensors: dict[str, StockTensor] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    _places: dict[tuple[str, tuple[int, ...] | None], _Place] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> StockDirectory:
        """Read the metadata. Raises: DamagedError if it is not DCP's; OSError."""
        path = folder / METADATA
        try:
            found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except OSError:
            raise
        except Exception as error:
            raise DamagedError(f"{path} is not the metadata of a DCP checkpoint: {error}") from error
        if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
            raise DamagedError(f"{path} is not the metadata of a DCP checkpoint")
        directory = cls(folder)
        directory._take(found, path)
        return directory

    def chunks(self, name: str) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """(offsets, tensor) of each saved box of a tensor, one in memory at a time.

        Raises: DamagedError if a box is missing or does not match the metadata.
        """
        tensor = self.tensors[name]
        for offsets, sizes in tensor.chunks:
            found = self._load((name, offsets), _load_safely)
            as_said = isinstance(found, torch.Tensor) and found.dtype == tensor.dtype
            if not as_said or tuple(found.shape) != sizes:
                raise DamagedError(f"{self.folder}: {name} at {list(offsets)} does not match {METADATA}")
            yield offsets, found

    def value(self, name: str, load: Loader | None = None) -> Any:
        """A value that is not a tensor. Raises: pickle.UnpicklingError if loading it would run code."""
        return self._load((name, None), load or _load_safely)

    def _take(self, found: Metadata, path: Path) -> None:
        values = []
        for name, item in found.state_dict_metadata.items():
            if isinstance(item, TensorStorageMetadata):
                self.tensors[name] = _tensor(item, name, path)
            else:
                values.append(name)
        self.values = tuple(values)
        if isinstance(found.planner_data, Mapping):
            self.paths = {k: tuple(v) for k, v in found.planner_data.items() if isinstance(v, tuple | list)}
        places = found.storage_data
        if not isinstance(places, dict) or not all(isinstance(place, _Place) for place in places.values()):
            raise DamagedError(f"{path} does not say which files hold its items: another writer wrote it")
        for index, place in places.items():
            offset = None if index.offset is None else tuple(index.offset)
            self._places[index.fqn, offset] = place
        for name, tensor in self.tensors.items():
            for offsets, sizes in tensor.chunks:
                place = self._place((name, offsets))
                too_long = math.prod(sizes) * tensor.dtype.itemsize > place.length
                if too_long and not place.transform_descriptors:
                    raise DamagedError(f"{path}: {name} at {list(offsets)} does not fit {place.length} bytes")

    def _place(self, key: tuple[str, tuple[int, ...] | None]) -> _Place:
        place = self._places.get(key)
        if place is None:
            raise DamagedError(f"{self.folder / METADATA} does not say where {key[0]} is stored")
        return place

    def _load(self, key: tuple[str, tuple[int, ...] | None], load: Loader) -> Any:
        place = self._place(key)
        if place.transform_descriptors:
            raise StateError(f"{self.folder}: {key[0]} was stored with an extension of DCP (compression?)")
        file = self.folder / safe_relative(str(place.relative_path))
        with open(file, "rb") as opened:
            opened.seek(place.offset)
            raw = opened.read(place.length)
        if len(raw) != place.length:
            raise DamagedError(f"{file} is truncated: it ends inside {key[0]}")
        try:
            return load(io.BytesIO(raw))
        except pickle.UnpicklingError:
            raise
        except Exception as error:
            raise DamagedError(f"{file}: {key[0]} cannot be read: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Allows only the classes of DCP's metadata, and nothing that has an effect when called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _STORAGE_INFO:
            return _Place
        if (module, name) == _MEMORY_FORMAT:
            return getattr(dcp_metadata, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return pathlib.PurePosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of DCP's metadata")


def _layout(name: object) -> torch.layout:
    """Replaces torch's own lookup: every tensor that DCP stores is strided."""
    return torch.strided


def _load_safely(raw: io.BytesIO) -> Any:
    return torch.load(raw, map_location="cpu", weights_only=True)


def _tensor(item: TensorStorageMetadata, name: str, path: Path) -> StockTensor:
    shape = tuple(item.size)
    chunks = tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in item.chunks)
    try:
        # Only the geometry matters here, so the element type is arbitrary.
        boxes = [Chunk(name, "U8", shape, offsets, sizes) for offsets, sizes in chunks]
    except ValueError as error:
        raise DamagedError(f"{path}: {error}") from error
    if not cover(shape, boxes):
        raise DamagedError(f"{path}: the boxes of {name} do not cover its shape {list(shape)}")
    return StockTensor(item.properties.dtype, shape, chunks)
