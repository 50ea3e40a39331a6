"""`.pt` files: `torch.load` with mapped storages, so that only what is read comes into memory."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.convert.state_tree import TensorRef
from engine.convert.tensors import windows_of
from engine.dcp.dtypes import from_torch
from engine.errors import DamagedError, StateError, UnsavableValueError
from engine.format.manifest import TensorInfo

_MAX_DEPTH = 48


class PtTensors:
    """The tensors of a loaded file, by their path in it."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def windows(self, name: str) -> Iterator[torch.Tensor]:
        """See `TensorSource`."""
        return windows_of(self.tensors[name])

    def add(self, name: str, tensor: torch.Tensor) -> TensorRef | None:
        """Note a tensor. None for one that the format cannot hold (sparse, complex, quantised)."""
        tensor = tensor.detach()
        try:
            info = TensorInfo(from_torch(tensor.dtype, name), tuple(tensor.shape))
        except UnsavableValueError:
            return None
        if tensor.layout != torch.strided or type(tensor) is not torch.Tensor:
            return None
        self.tensors[name] = tensor
        self._infos[name] = info
        return TensorRef(name, info)


def open_pt(path: Path, *, trust_pickle: bool = False) -> tuple[dict[str, Any], PtTensors]:
    """(tree, tensors) of a file.

    Raises: StateError when loading it would run code and `trust_pickle` is not given, or when it is not a
        dict; DamagedError; OSError.
    """
    loaded = _load(path, trust_pickle)
    if not isinstance(loaded, Mapping):
        raise StateError(f"{path} holds a {type(loaded).__name__}, not a dict with a state in it")
    tensors = PtTensors()
    return {str(key): _tree(value, str(key), tensors) for key, value in loaded.items()}, tensors


def refused(path: Path, error: Exception) -> StateError:
    """The error for a pickle that would run code."""
    reason = str(error).strip().splitlines()
    named = next((line.strip() for line in reason if "GLOBAL" in line or "Unsupported" in line), "")
    detail = f" ({named[:200]})" if named else ""
    return StateError(
        f"{path} holds objects whose loading runs code of its author's choice{detail}: refused. If you trust "
        "whoever made it, give --trust_pickle"
    )


def _load(path: Path, trust_pickle: bool) -> Any:
    with open(path, "rb"):  # whether it can be read at all: torch's own errors do not tell
        pass
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=not trust_pickle)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            # Written before torch 1.6: such a file cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        if trust_pickle:
            raise DamagedError(f"{path} cannot be loaded: {error}") from error
        raise refused(path, error) from error
    except Exception as error:
        raise DamagedError(f"{path} is not a file that torch.load reads: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tree(value: Any, path: str, tensors: PtTensors, depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise StateError(f"{path[:80]}... is nested deeper than {_MAX_DEPTH} levels (a cycle?)")
    if isinstance(value, torch.Tensor):
        return tensors.add(path, value)
    if isinstance(value, Mapping):
        return {key: _tree(item, f"{path}/{key}", tensors, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        items = [_tree(item, f"{path}/{place}", tensors, depth + 1) for place, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value
