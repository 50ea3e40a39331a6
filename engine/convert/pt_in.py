"""Opens `.pt` files: `torch.load` with mapped storages, so that only what is read uses memory."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from engine.convert.file_kinds import FileKind, file_kind, refuse_other
from engine.convert.state_tree import TensorRef, Unheld
from engine.convert.tensors import windows_of
from engine.convert.unpickling import Unknown, load
from engine.errors import StateError, UnsavableValueError
from engine.format.manifest import TensorInfo
from engine.state.tensor_format import from_torch

_MAX_DEPTH = 48

_Storage = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


class PtTensors:
    """The tensors of a loaded file, by their path in it. A tensor with two paths is one tensor."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._shared: dict[_Storage, TensorRef] = {}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def windows(self, name: str) -> Iterator[torch.Tensor]:
        """See `TensorSource`."""
        return windows_of(self.tensors[name])

    def add(self, name: str, tensor: torch.Tensor) -> TensorRef | Unheld:
        """Add a tensor; returns Unheld if the format cannot store it (sparse, quantised, ...)."""
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor:
            return Unheld(f"a tensor of the class {type(tensor).__name__}")
        if tensor.is_meta:
            return Unheld("a tensor without values (meta device)")
        if tensor.is_nested:  # it has no single shape
            return Unheld("a nested tensor")
        if tensor.layout != torch.strided:
            return Unheld(f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})")
        try:
            info = TensorInfo(from_torch(tensor.dtype, name), tuple(tensor.shape))
        except UnsavableValueError:
            return Unheld(f"a tensor of {tensor.dtype}")
        # A conjugate shares its tensor's memory; only a flag bit distinguishes them.
        tensor = tensor.resolve_conj().resolve_neg()
        place = (tensor.data_ptr(), info.shape, tuple(tensor.stride()), tensor.dtype)
        if tensor.numel() and place in self._shared:  # tied weights
            return self._shared[place]
        self.tensors[name] = tensor
        self._infos[name] = info
        ref = TensorRef(name, info)
        if tensor.numel():  # empty ones all have address 0
            self._shared[place] = ref
        return ref


def open_pt(
    path: Path, *, trust_pickle: bool = False, kind: FileKind | None = None, prefix: str = ""
) -> tuple[dict[str, Any], PtTensors, tuple[str, ...]]:
    """(tree, tensors, notes) of a file; the names of its tensors begin with `prefix`.

    Raises: ConfigError if neither pickle nor torch wrote it; StateError if loading it would run code and
        `trust_pickle` is not set, or if it is not a dict; DamagedError; OSError.
    """
    kind = kind or file_kind(path)
    refuse_other(path, kind)
    loaded, unknown = load(path, kind, trust_pickle=trust_pickle)
    tensors = PtTensors()
    tree = _tree(loaded, prefix, tensors)
    if not isinstance(tree, dict):
        raise StateError(f"{path} holds a {type(loaded).__name__}, not a dict with a state")
    notes = [f"objects of missing classes were read as data: {', '.join(unknown)}"]
    return {str(key): value for key, value in tree.items()}, tensors, tuple(notes if unknown else ())


def _tree(value: Any, path: str, tensors: PtTensors, depth: int = 0) -> Any:
    """The value with references for tensors, and attributes for objects."""
    if depth > _MAX_DEPTH:
        return Unheld(f"nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, torch.Tensor):
        return tensors.add(path, value)
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, Unknown):
        return _tree(value.data(), path, tensors, depth + 1)
    if isinstance(value, Mapping):
        inner = f"{path}/" if path else ""
        return {key: _tree(item, f"{inner}{key}", tensors, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_tree(item, f"{path}/{place}", tensors, depth + 1) for place, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    return _plain(value, path, tensors, depth)


def _plain(value: Any, path: str, tensors: PtTensors, depth: int) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc" or not value.dtype.isnative:
            return Unheld(f"a NumPy array of {value.dtype}")
        return tensors.add(path, torch.from_numpy(np.array(value)))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, enum.Enum):
        return _tree(value.value, path, tensors, depth + 1)
    if isinstance(value, PurePath | torch.dtype | torch.device):
        return str(value)
    is_object = hasattr(value, "__dict__") and not isinstance(
        value, type | types.FunctionType | types.ModuleType
    )
    return _tree(dict(vars(value)), path, tensors, depth + 1) if is_object else value
