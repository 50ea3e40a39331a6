"""Opens a stock DCP directory as a tree."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.convert.dcp_stock_read import StockDirectory
from engine.convert.state_tree import TensorRef, Unheld
from engine.convert.tensors import windows_of
from engine.convert.unpickling import Unknown, load_bytes
from engine.errors import UnsavableValueError
from engine.format.manifest import TensorInfo
from engine.state.tensor_format import from_torch

_MODEL = "model."


class DcpTensors:
    """The tensors of a directory, by flattened name."""

    def __init__(self, directory: StockDirectory) -> None:
        self._directory = directory
        self._infos: dict[str, TensorInfo] = {}
        self.unheld: dict[str, Unheld] = {}
        for name, tensor in directory.tensors.items():
            try:
                self._infos[name] = TensorInfo(from_torch(tensor.dtype, name), tensor.shape)
            except UnsavableValueError:
                self.unheld[name] = Unheld(f"a tensor of {tensor.dtype}")

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def windows(self, name: str) -> Iterator[torch.Tensor]:
        """See `TensorSource`. Boxes of whole rows, in order, are streamed; others are assembled first."""
        tensor = self._directory.tensors[name]
        rows = tensor.shape[1:]
        ordered = [offsets for offsets, _ in tensor.chunks] == sorted(offsets for offsets, _ in tensor.chunks)
        if tensor.shape and ordered and all(sizes[1:] == rows for _, sizes in tensor.chunks):
            for _, chunk in self._directory.chunks(name):
                if chunk.numel() or not math.prod(tensor.shape):
                    yield from windows_of(chunk)
            return
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        for offsets, chunk in self._directory.chunks(name):
            box: Any = tuple(slice(b, b + size) for b, size in zip(offsets, chunk.shape, strict=True))
            out[box].copy_(chunk)
        yield from windows_of(out)


def open_dcp(path: Path, *, trust_pickle: bool = False) -> tuple[dict[str, Any], DcpTensors, tuple[str, ...]]:
    """(tree, tensors, notes) of a directory.

    A value that cannot be loaded without running code becomes `Unheld` in the tree, unless `trust_pickle` is
    set. Each value is a separate pickle, so the others load without trust.
    Raises: DamagedError; OSError.
    """
    directory = StockDirectory.open(path)
    tensors = DcpTensors(directory)
    tree: dict[str, Any] = {}
    unknown: dict[str, type[Unknown]] = {}
    for name, info in tensors.infos.items():
        _put(tree, _path(directory, name), TensorRef(name, info))
    for name, unheld in tensors.unheld.items():
        _put(tree, _path(directory, name), unheld)
    for name in directory.values:
        _put(tree, _path(directory, name), _value(directory, name, trust_pickle, unknown))
    notes = [f"objects of missing classes were read as data: {', '.join(unknown)}"]
    return _lists(tree), tensors, tuple(notes if unknown else ())


def _value(
    directory: StockDirectory, name: str, trust_pickle: bool, unknown: dict[str, type[Unknown]]
) -> Any:
    if trust_pickle:
        value = directory.value(name, lambda raw: load_bytes(raw, unknown))
        return value.data() if isinstance(value, Unknown) else value
    try:
        return directory.value(name)
    except pickle.UnpicklingError:
        return Unheld("a pickle that would run code; --trust_pickle loads it")


def _path(directory: StockDirectory, name: str) -> tuple[str | int, ...]:
    """An item's path in the nested state. Names without a recorded path are taken as a model's."""
    recorded = directory.paths.get(name)
    if recorded is not None and len(recorded) > 1:
        return recorded
    return ("model", name.removeprefix(_MODEL)) if name.startswith(_MODEL) else (name,)


def _put(tree: dict[Any, Any], path: tuple[str | int, ...], value: Any) -> None:
    for place, step in enumerate(path[:-1]):
        inner = tree.setdefault(step, {})
        if not isinstance(inner, dict):  # a value and a dict have the same name: keep both
            tree[".".join(map(str, path[place:]))] = value
            return
        tree = inner
    tree[path[-1]] = value


def _lists(value: Any) -> Any:
    """Turn dicts with the keys 0, 1, 2, ... back into lists."""
    if not isinstance(value, dict):
        return value
    if value and sorted(value, key=str) == sorted(range(len(value)), key=str):
        return [_lists(value[key]) for key in sorted(value)]
    return {key: _lists(item) for key, item in value.items()}
