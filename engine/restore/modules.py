"""The modules of a state, made ready to receive one checkpoint.

Their tensors are filled in place. Their documents hold what else was in state_dict() when it was saved: extra
state, and what hooks and overrides had added. Those values are handed back after all tensors were read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from engine.errors import DamagedError
from engine.format.manifest import TensorInfo
from engine.restore.filters import Filter
from engine.restore.loading import has_own_loader, load_values, set_to_none
from engine.restore.saved import Saved
from engine.state import values
from engine.state.capture import StateCapture
from engine.state.metrics import UPDATE_COUNTS
from engine.state.modules import ABSENT_BUFFERS, COMPOSITES, LATE_BUFFERS, NOTES, ModuleCapture
from engine.state.state_dicts import module_to_ask
from engine.state.tensor_format import to_torch
from engine.state.wrappers import NamedModule, named_modules, wrapped_by


class Modules:
    """The selected modules. Tensors that they lack are made to read into; `abandon` removes these again.

    Args:
        keys: the selected state keys.
    Attributes:
        missing, unexpected: values of state_dict() that only the live state or only the checkpoint has.
        absent: names of live buffers that were None when saved.
        differences: one sentence for each composite tensor that differs in kind from the saved one.
        loose: names of saved tensors that are handed to load_state_dict(), as no live tensor can be filled.
    """

    def __init__(self, capture: StateCapture, keys: list[str], saved: Saved, filter: Filter) -> None:
        self._capture = capture
        self._keys = keys
        self._saved = saved
        self._filter = filter
        self._missing_tensors = MissingTensors()
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.differences: list[str] = []
        self.absent: set[str] = set()
        self.loose: set[str] = set()

    def prepare(self) -> None:
        """Make the tensors that modules lack, and compare. Call it before any other method."""
        made = []
        for key, capture in self._modules():
            late = self._document(key, None).get(LATE_BUFFERS, ())
            made.append(self._missing_tensors.make(capture.module, partial(self._info, key), late))
        if any(made):
            self._capture.refresh()
        for key, capture in self._modules():
            document = self._document(key, None)
            absent = document.pop(ABSENT_BUFFERS, ())
            self._compare_composites(key, capture, document.pop(COMPOSITES, {}))
            self.absent |= {f"{key}.{name}" for name in absent if self._filter.takes(f"{key}.{name}")}
            document = {name: value for name, value in document.items() if name not in NOTES}
            self._find_loose(key, capture, document)
            self._compare(key, capture, document)

    def will_read(self, live: Mapping[str, torch.Tensor]) -> None:
        """Register the tensors inside documents, and the loose ones, to be read."""
        for key, _ in self._modules():
            self._saved.will_read(self._saved.json(key), live)
        for name in self.loose:
            self._saved.will_read({"$tensor": name}, {})

    def abandon(self) -> None:
        """Nothing will be read: remove the tensors that were made to read into."""
        self._missing_tensors.abandon()

    def is_empty(self, key: str) -> bool:
        """Whether a module has nothing to restore: a loss, an activation."""
        capture = self._capture.modules.get(key)
        return capture is not None and not capture.tensors and not capture.state.key_of

    def finish(self) -> None:
        """Hand every module its values, after all tensors were read."""
        for key, capture in self._modules():
            document = self._document(key, self._saved)
            absent = document.pop(ABSENT_BUFFERS, ())
            for note in NOTES - {UPDATE_COUNTS}:
                document.pop(note, None)
            mine = [name for name in self.loose if name.startswith(f"{key}.")]
            loose = {name.removeprefix(f"{key}."): self._saved.tensors[name] for name in mine}
            load_values(key, capture.module, document, loose, strict=self._filter.strict)
            set_to_none(capture.module, {name for name in absent if f"{key}.{name}" in self.absent})

    def _modules(self) -> Iterator[tuple[str, ModuleCapture]]:
        return ((key, capture) for key, capture in self._capture.modules.items() if key in self._keys)

    def _info(self, key: str, name: str) -> TensorInfo | None:
        """What was saved under a module's tensor name, if it is selected."""
        manifest, full = self._saved.manifest, f"{key}.{name}"
        return manifest.tensors.get(manifest.aliases.get(full, full)) if self._filter.takes(full) else None

    def _document(self, key: str, saved: Saved | None) -> dict[Any, Any]:
        """The selected values that were saved besides tensors. Without `saved`, with blank tensors."""
        document = self._saved.json(key) or {}
        found = saved.decoded(document) if saved else values.decode(document, self._saved.blank)
        if not isinstance(found, dict):
            raise DamagedError(f"{self._saved.manifest.id}: the saved values of {key} are not a module's")
        return {
            name: value
            for name, value in found.items()
            if name in NOTES or self._filter.takes(f"{key}.{name}")
        }

    def _find_loose(self, key: str, capture: ModuleCapture, document: Mapping[Any, Any]) -> None:
        manifest, live = self._saved.manifest, capture.state.tensors
        inside = set(values.tensor_names(self._saved.json(key)))
        tree = named_modules(module_to_ask(capture.module))
        for full, info in manifest.tensors.items():
            name = full.removeprefix(f"{key}.")
            if name == full or full in inside or not self._filter.takes(full):
                continue
            mine = live.get(name)
            if mine is None:
                # Older checkpoints have every tensor that state_dict() returned among the tensors.
                loose = name in capture.value_names or has_own_loader(name, tree)
            else:
                fits = isinstance(mine, torch.nn.Parameter) or tuple(mine.shape) == info.shape
                loose = not fits and has_own_loader(name, tree)
            if loose:
                self.loose.add(full)

    def _compare(self, key: str, capture: ModuleCapture, document: Mapping[Any, Any]) -> None:
        tree = named_modules(module_to_ask(capture.module))
        for name in document:
            if name not in capture.state.key_of and not has_own_loader(str(name), tree):
                self.unexpected.append(f"{key}.{name} (a value from state_dict(), not a tensor)")
        for name in capture.value_names - {UPDATE_COUNTS}:
            full = f"{key}.{name}"
            if name not in document and full not in self.loose and self._filter.takes(full):
                self.missing.append(f"{full} (a value from state_dict(), not a tensor)")

    def _compare_composites(self, key: str, capture: ModuleCapture, saved: Mapping[str, Any]) -> None:
        for name, here in capture.composites().items():
            full, then = f"{key}.{name}", saved.get(name)
            if then != here and self._filter.takes(full):
                was = _kind(then) if then else "a tensor that is not made of others"
                self.differences.append(f"{full}: saved as {was}, here {_kind(here)}")


def _kind(described: Mapping[str, Any]) -> str:
    return f"{described['class']} {described['shape']} ({described['context']})"


class MissingTensors:
    """Makes tensors that fresh modules lack (of lazy modules, buffers that are None), and can undo it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def make(self, module: nn.Module, info: Callable[[str], TensorInfo | None], late: Sequence[str]) -> bool:
        """Make what a module lacks and the checkpoint has. Returns whether anything was made.

        info: dtype and global shape of what will be read under a canonical name; None if nothing will.
        late: names of buffers that were registered during training.
        """
        before = len(self._undo)
        for named in named_modules(module):
            self._register(named, [name for name in late if info(name)])
            child = named.module
            for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
                persistent = name not in child._non_persistent_buffers_set
                found = info(named.name + name) if tensor is None or is_lazy(tensor) else None
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

    def _register(self, named: NamedModule, late: Sequence[str]) -> None:
        for full in late:
            prefix, dot, name = full.rpartition(".")
            here = prefix + dot == named.name and wrapped_by(named.module) is None
            if here and not hasattr(named.module, name):
                named.module.register_buffer(name, None)
                self._undo.append(partial(delattr, named.module, name))

    def abandon(self) -> None:
        """Leave the modules as they were."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


def _forget_shape(tensor: torch.Tensor, kind: type, data: torch.Tensor) -> None:
    tensor.data = data
    tensor.__class__ = kind  # what materialize() changes, besides the data


def _device_of(child: nn.Module, root: nn.Module) -> torch.device:
    """The device of the nearest tensor: a buffer that is None has none."""
    for module in (child, root):
        for tensor in (*module.parameters(), *module.buffers()):
            return torch.device(tensor.device)
    return torch.device("cpu")
