"""Tensors that a fresh module does not have yet: those of lazy modules, buffers that are None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from engine.format.manifest import TensorInfo
from engine.state.torch_dtypes import to_torch
from engine.state.wrappers import Place, places, wrapped_by


class Unmade:
    """Makes them, so that there is something to read into, and takes them away when nothing will be read."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def make(
        self, module: nn.Module, info: Callable[[str], TensorInfo | None], late: Sequence[str]
    ) -> bool:
        """Make what a module lacks and the checkpoint has. Returns whether there was something to make.

        info: dtype and global shape of what is to be read under a canonical name; None for what is not.
        late: names of buffers that were registered in training.
        """
        before = len(self._undo)
        for place in places(module):
            self._register(place, [name for name in late if info(name)])
            child = place.module
            for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
                persistent = name not in child._non_persistent_buffers_set
                found = info(place.name + name) if tensor is None or is_lazy(tensor) else None
                if found is None or not persistent:
                    continue
                if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                    self._undo.append(partial(_forget_shape, tensor, type(tensor), tensor.data))
                    tensor.materialize(found.shape)
                elif name in child._buffers:
                    child._buffers[name] = torch.zeros(
                        found.shape, dtype=to_torch(found.dtype), device=_device_of(child, module)
                    )
                    self._undo.append(partial(child._buffers.__setitem__, name, None))
        return len(self._undo) > before

    def _register(self, place: Place, late: Sequence[str]) -> None:
        for full in late:
            prefix, dot, name = full.rpartition(".")
            here = prefix + dot == place.name and wrapped_by(place.module) is None
            if here and not hasattr(place.module, name):
                place.module.register_buffer(name, None)
                self._undo.append(partial(delattr, place.module, name))

    def abandon(self) -> None:
        """Leave the modules as they were."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


def _forget_shape(tensor: torch.Tensor, kind: type, data: torch.Tensor) -> None:
    tensor.data = data
    tensor.__class__ = kind  # what materialize() changes, besides the data


def _device_of(child: nn.Module, root: nn.Module) -> torch.device:
    """Where the nearest tensor is: nothing else says where a buffer that is None belongs."""
    for module in (child, root):
        for tensor in (*module.parameters(), *module.buffers()):
            return torch.device(tensor.device)
    return torch.device("cpu")
