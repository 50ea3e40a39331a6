"""What one optimizer reads of a checkpoint: into which memory, and how the saved and the live state differ.

The saved state wins. A parameter gets the fields that were saved for it, in the live tensors where those have
the saved dtype and shape, else in new ones; other fields are dropped. State is made from what the checkpoint
says, never by a step of the optimizer. Planning changes nothing: `engine.restore.optimizers` hands over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from engine.format.manifest import TensorInfo
from engine.restore.filters import Filter
from engine.restore.matching import describe, has_grown
from engine.restore.optimizer_matching import (
    Assigned,
    Group,
    assign,
    class_difference,
    known,
    live_group,
    match_names,
)
from engine.restore.saved import Saved
from engine.state import values
from engine.state.composites import is_composite
from engine.state.local_boxes import detached, global_shape
from engine.state.modules import pointer_of
from engine.state.optimizer_document import parse, split_path
from engine.state.optimizer_kinds import state_of
from engine.state.optimizer_layouts import allocate, shared_paths
from engine.state.optimizers import OptimizerCapture
from engine.state.tensor_format import from_torch, to_torch


class OptimizerPlan:
    """One live optimizer and what it reads of the checkpoint.

    Args:
        document: the optimizer's document, as stored.
        stored: the names of saved tensors, among them the optimizer's.
    Attributes:
        tensors: what to read, by a name of the destination.
        sources: the saved name of each tensor that has its saved shape here.
        grown: the saved name of each tensor whose first rows alone were saved.
        differences: one sentence for each difference.
        unexpected: saved names that have no place here.
        saved_names: live parameter -> saved parameter.
        fields: live parameter -> {field: name of the tensor that it is read into}.
        values: saved parameter -> {field: JSON}, of state that is not a tensor.
        kept: live parameters that keep the state that they have.
        live_tensors: the live tensors among `tensors`, by name; the others are new.
        assigned: the hyperparameters of the live groups.
        takes_all: whether nothing is left out; an own load_state_dict() cannot load a part.
        inner: the plans of optimizers inside of this one.
    """

    def __init__(
        self, capture: OptimizerCapture, document: Any, stored: Iterable[str], saved: Saved, filter: Filter
    ) -> None:
        self.capture = capture
        self.saved = saved
        self.document = parse(capture.key, document)
        self._filter = filter
        self.tensors: dict[str, torch.Tensor] = {}
        self.sources: dict[str, str] = {}
        self.grown: dict[str, str] = {}
        self.differences: list[str] = []
        self.unexpected: list[str] = []
        self.saved_names: dict[str, str] = {}
        self.fields: dict[str, dict[str, str]] = {}
        self.values: dict[str, dict[str, Any]] = defaultdict(dict)
        self.kept: set[str] = set()
        self.live_tensors: dict[str, torch.Tensor] = {}
        self.assigned = Assigned([])
        self.takes_all = True
        self.inner: list[OptimizerPlan] = []
        difference = class_difference(capture.key, capture.optimizer, self.document)
        if difference:
            self.differences.append(difference)
            return
        self._names = {name for names in self.document.names for name in names}
        self.saved_names = match_names(capture.full_names, capture.owner, self._names, saved.manifest.aliases)
        groups = capture.optimizer.param_groups
        self._groups = {parameter: group for group in groups for parameter in group["params"]}
        self._pointers = {pointer_of(parameter.detach()) for parameter in self._groups}
        # One state tensor under several paths: each path -> the first, and the name that is read under.
        self._first_paths = shared_paths(self.document.layouts)
        self._shared: dict[str, str] = {}
        self._plan_values()
        self._plan_tensors(stored)
        self.assigned = self._assign()
        self.differences += [*self.assigned.conflicts, *self._order_difference()]
        self._plan_inner(stored)

    def takes_field(self, live: str, field: str) -> bool:
        return self.takes(f"{self.capture.key}.state.{live}.{field}")

    def takes(self, name: str) -> bool:
        taken = self._filter.takes_value(self.capture.key.partition(".")[0], name)
        self.takes_all &= taken
        return taken

    def _plan_values(self) -> None:
        """Register the tensors inside values to be read: in parameters' state, in groups, and elsewhere."""
        document = self.document
        for path, value in document.counters.items():
            name, field = split_path(path, self._names)
            self.values[name][field] = value
        memory: dict[str, torch.Tensor] = {}
        for live, name in self.saved_names.items():
            if live in self.capture.local:
                nested = [*self.values[name].items(), ("", document.entries.get(name))]
                for field, value in nested:
                    for tensor in values.tensor_names(value):
                        memory[tensor] = self._allocate(live, field, self.saved.info(tensor))
        mine = [value for fields in self.values.values() for value in fields.values()]
        mine += [*document.entries.values(), *document.groups, *(value for _, value in document.extra)]
        for value in mine:
            self.saved.will_read(value, memory)
        for key, _ in document.extra:
            self.takes(f"{self.capture.key}.state.{key}")

    def _plan_tensors(self, stored: Iterable[str]) -> None:
        prefix = f"{self.capture.key}.state."
        fields: dict[str, dict[str, str]] = defaultdict(dict)
        for tensor in stored:
            if tensor.startswith(prefix) and tensor not in self.saved.tensors:
                name, field = split_path(tensor.removeprefix(prefix), self._names)
                fields[name][field] = tensor
        for live, name in self.saved_names.items():
            if live in self.capture.local:
                self._plan_parameter(live, fields.get(name, {}))
        if not self._filter.strict:
            self.kept |= self.capture.local.keys() - self.saved_names.keys()
        here = set(self.saved_names.values())
        lost = [tensor for name, found in fields.items() if name not in here for tensor in found.values()]
        self.unexpected += [tensor for tensor in lost if self.takes(tensor)]

    def _plan_parameter(self, live: str, fields: Mapping[str, str]) -> None:
        key, parameter = self.capture.key, self.capture.parameters[live]
        entry = state_of(self.capture.optimizer).get(parameter)
        was = self._saved_parameter(live)
        is_ = TensorInfo(from_torch(parameter.dtype, live), global_shape(parameter))
        planned: dict[str, torch.Tensor] = {}
        sources: dict[str, str] = {}
        grown: dict[str, str] = {}
        same: dict[str, str] = {}
        firsts: dict[str, str] = {}
        lines: list[str] = []
        for field, tensor in fields.items():
            name, info = f"{key}.state.{live}.{field}", self.saved.info(tensor)
            if not self.takes_field(live, field):
                continue
            own = entry.get(field) if isinstance(entry, dict) else None
            here = info
            if was is not None and was != is_ and was.shape == info.shape:
                here = TensorInfo(is_.dtype if info.dtype == was.dtype else info.dtype, is_.shape)
            elif isinstance(own, torch.Tensor) and from_torch(own.dtype, name) != info.dtype:
                here = TensorInfo(from_torch(own.dtype, name), global_shape(detached(own, like=parameter)))
            if here == info:
                one = self._first_paths.get(f"{self.saved_names[live]}.{field}", "")
                same[field] = self._shared.get(one, firsts.get(one, name))
                if same[field] != name:
                    continue
                if one:
                    firsts[one] = name
                sources[name] = tensor
                planned[name] = self._memory(name, live, field, own, info)
                continue
            lines.append(f"{name}: saved as {describe(info)}, here {describe(here)}")
            if has_grown(info, here):
                grown[name] = tensor
                planned[name] = self._allocate(live, field, here, zeros=True)
        self.differences += lines
        if len(lines) > len(grown):  # a part of a parameter's state is worse than the state that it has
            self.kept.add(live)
        else:
            self.sources |= sources
            self.grown |= grown
            self.tensors |= planned
            self._shared |= firsts
            self.fields[live] = {name.removeprefix(f"{key}.state.{live}."): name for name in planned} | same

    def _memory(self, name: str, live: str, field: str, own: Any, info: TensorInfo) -> torch.Tensor:
        """The live tensor where it has the saved shape, else a new one."""
        if isinstance(own, torch.Tensor) and not is_composite(own):
            found = detached(own, like=self.capture.parameters[live])
            # Memory that it shares with another tensor would be read into twice.
            pointer = pointer_of(found) if global_shape(found) == info.shape else None
            if pointer is not None and (not pointer or pointer not in self._pointers):
                self._pointers.add(pointer)
                self.live_tensors[name] = own
                return found
        return self._allocate(live, field, info)

    def _allocate(self, live: str, field: str, info: TensorInfo, *, zeros: bool = False) -> torch.Tensor:
        parameter = self.capture.parameters[live]
        group, layout = self._groups[parameter], self._layout(live, field)
        return allocate(to_torch(info.dtype), info.shape, field, parameter, group, layout, zeros=zeros)

    def _layout(self, live: str, field: str) -> Mapping[str, Any]:
        return self.document.layouts.get(f"{self.saved_names[live]}.{field}", {})

    def _saved_parameter(self, live: str) -> TensorInfo | None:
        manifest = self.saved.manifest
        names = self.capture.full_names[live]
        found = (manifest.tensors.get(manifest.aliases.get(name, name)) for name in names)
        return next((info for info in found if info is not None), None)

    def _assign(self) -> Assigned:
        groups = zip(self.capture.group_names(), self.capture.optimizer.param_groups, strict=True)
        live = [live_group(names, group, self.saved_names) for names, group in groups]
        saved = [
            Group(names, {name: known(value) for name, value in group.items()})
            for group, names in zip(self.document.groups, self.document.names, strict=True)
        ]
        prefix = f"{self.capture.key}.param_groups."
        return assign(self.capture.key, live, saved, lambda name: self.takes(f"{prefix}{name}"))

    def _order_difference(self) -> list[str]:
        """An own state_dict() that refers to parameters by position needs the saved order."""
        if self.document.own is None or not self.takes_all:
            return []
        names = self.capture.group_names()
        if [[self.saved_names.get(name) for name in group] for group in names] == self.document.names:
            return []
        kind = type(self.capture.optimizer).__name__
        return [
            f"{self.capture.key}: a {kind} saves its state by the position of its parameters, and these or "
            "their order differ from the saved run's; build it as the saved run did"
        ]

    def _plan_inner(self, stored: Iterable[str]) -> None:
        key, saved, live = self.capture.key, self.document.inner, self.capture.inner
        for name in sorted({*saved, *live}):
            if name not in live:
                self.differences.append(f"{key}: its {name} was an optimizer when saved, and is not one here")
            elif name not in saved:
                self.differences.append(f"{key}: its {name} is an optimizer here, and was not one when saved")
            else:
                one = OptimizerPlan(live[name], saved[name], stored, self.saved, self._filter)
                self.inner.append(one)
                self.tensors |= one.tensors
                self.sources |= one.sources
                self.grown |= one.grown
                self.differences += one.differences
                self.unexpected += one.unexpected
        told = {*self.sources.values(), *self.unexpected}
        own = [name for name in values.tensor_names(self.document.own) if name not in told]
        self.saved.will_read([{"$tensor": name} for name in own], {})
