"""Give one optimizer its saved state: made from what the checkpoint says, never by a step.

The saved state wins. A parameter gets the fields that were saved for it, in the live tensors where those have
their dtype and shape, else in new ones; what was not saved is dropped. Nothing changes before `finish`.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch

from engine.errors import RestoreFailedError
from engine.format.manifest import TensorInfo
from engine.restore.filters import Wanted
from engine.restore.loading import load_optimizer
from engine.restore.matching import describe, has_grown
from engine.restore.optimizer_matching import (
    Assigned,
    Group,
    Unread,
    assign,
    class_difference,
    known,
    live_group,
    match_names,
    set_values,
)
from engine.restore.saved import Saved
from engine.state import values
from engine.state.composites import is_composite
from engine.state.local_boxes import detached, global_shape
from engine.state.modules import pointer_of
from engine.state.optimizer_document import parse, split_path
from engine.state.optimizer_kinds import state_of
from engine.state.optimizer_layouts import made, one_of_several
from engine.state.optimizer_state_dicts import first_difference, with_names, with_parameters
from engine.state.optimizers import OptimizerCapture
from engine.state.tensor_format import from_torch, to_torch

log = logging.getLogger(__name__)


class OptimizerRestore:
    """One live optimizer and what the checkpoint has for it.

    Args:
        document: its document, as stored.
        stored: the names of saved tensors, its own among them.
    Attributes:
        tensors: what to read, by a name of the destination.
        sources: the saved name of each that was saved as it is here.
        grown: the saved name of each of which only the first rows were saved.
        lines: one sentence for each difference.
        unexpected: saved names that belong to nobody here.
    """

    def __init__(
        self, capture: OptimizerCapture, document: Any, stored: Iterable[str], saved: Saved, wanted: Wanted
    ) -> None:
        self._capture = capture
        self._saved = saved
        self._wanted = wanted
        self._document = parse(capture.key, document)
        self.tensors: dict[str, torch.Tensor] = {}
        self.sources: dict[str, str] = {}
        self.grown: dict[str, str] = {}
        self.lines: list[str] = []
        self.unexpected: list[str] = []
        self._live_tensors: dict[str, torch.Tensor] = {}
        self._fields: dict[str, dict[str, str]] = {}
        self._kept: set[str] = set()
        self._ones = one_of_several(self._document.layouts)
        self._shared: dict[str, str] = {}  # the first path of such a one -> the name it is read under
        self._takes_all = True  # until something is left out: its own load_state_dict knows no parts
        self._values: dict[str, dict[str, Any]] = defaultdict(dict)
        self._inner: list[OptimizerRestore] = []
        self._assigned = Assigned([])
        difference = class_difference(capture.key, capture.optimizer, self._document)
        if difference:
            self.lines.append(difference)
            return
        self._names = {name for names in self._document.names for name in names}
        self._saved_names = match_names(
            capture.full_names, capture.owner, self._names, saved.manifest.aliases
        )
        groups = capture.optimizer.param_groups
        self._groups = {parameter: group for group in groups for parameter in group["params"]}
        self._pointers = {pointer_of(parameter.detach()) for parameter in self._groups}
        self._plan_values()
        self._plan_tensors(stored)
        self._assigned = self._assign()
        self.lines += [*self._assigned.conflicts, *self._order_difference()]
        self._plan_inner(stored)

    def _takes(self, live: str, field: str) -> bool:
        return self._takes_name(f"{self._capture.key}.state.{live}.{field}")

    def _takes_name(self, name: str) -> bool:
        taken = self._wanted.takes_value(self._capture.key.partition(".")[0], name)
        self._takes_all &= taken
        return taken

    def _plan_values(self) -> None:
        """Have the tensors inside of values read: nested in a parameter's state, in groups, and elsewhere."""
        document = self._document
        for path, value in document.counters.items():
            name, field = split_path(path, self._names)
            self._values[name][field] = value
        memory: dict[str, torch.Tensor] = {}
        for live, name in self._saved_names.items():
            if live in self._capture.local:
                nested = [*self._values[name].items(), ("", document.entries.get(name))]
                for field, value in nested:
                    for tensor in values.tensor_names(value):
                        memory[tensor] = self._made(live, field, self._saved.info(tensor))
        mine = [value for fields in self._values.values() for value in fields.values()]
        mine += [*document.entries.values(), *document.groups, *(value for _, value in document.extra)]
        for value in mine:
            self._saved.will_read(value, memory)
        for key, _ in document.extra:
            self._takes_name(f"{self._capture.key}.state.{key}")

    def _plan_tensors(self, stored: Iterable[str]) -> None:
        prefix = f"{self._capture.key}.state."
        fields: dict[str, dict[str, str]] = defaultdict(dict)
        for tensor in stored:
            if tensor.startswith(prefix) and tensor not in self._saved.tensors:
                name, field = split_path(tensor.removeprefix(prefix), self._names)
                fields[name][field] = tensor
        for live, name in self._saved_names.items():
            if live in self._capture.local:
                self._plan_parameter(live, fields.get(name, {}))
        if not self._wanted.strict:
            self._kept |= self._capture.local.keys() - self._saved_names.keys()
        here = set(self._saved_names.values())
        lost = [tensor for name, found in fields.items() if name not in here for tensor in found.values()]
        self.unexpected += [tensor for tensor in lost if self._takes_name(tensor)]

    def _plan_parameter(self, live: str, fields: Mapping[str, str]) -> None:
        key, parameter = self._capture.key, self._capture.parameters[live]
        entry = state_of(self._capture.optimizer).get(parameter)
        was = self._saved_parameter(live)
        is_ = TensorInfo(from_torch(parameter.dtype, live), global_shape(parameter))
        planned: dict[str, torch.Tensor] = {}
        sources: dict[str, str] = {}
        grown: dict[str, str] = {}
        same: dict[str, str] = {}
        firsts: dict[str, str] = {}
        lines: list[str] = []
        for field, tensor in fields.items():
            name, info = f"{key}.state.{live}.{field}", self._saved.info(tensor)
            if not self._takes(live, field):
                continue
            own = entry.get(field) if isinstance(entry, dict) else None
            here = None
            if was is not None and was != is_ and was.shape == info.shape:
                here = TensorInfo(is_.dtype if info.dtype == was.dtype else info.dtype, is_.shape)
                here = None if here == info else here
            elif isinstance(own, torch.Tensor) and from_torch(own.dtype, name) != info.dtype:
                here = TensorInfo(from_torch(own.dtype, name), global_shape(detached(own, like=parameter)))
            if here is None:
                one = self._ones.get(f"{self._saved_names[live]}.{field}", "")
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
                planned[name] = self._made(live, field, here, zeros=True)
        self.lines += lines
        if len(lines) > len(grown):  # a part of a parameter's state is worse than none
            self._kept.add(live)
        else:
            self.sources |= sources
            self.grown |= grown
            self.tensors |= planned
            self._shared |= firsts
            self._fields[live] = {name.removeprefix(f"{key}.state.{live}."): name for name in planned} | same

    def _memory(self, name: str, live: str, field: str, own: Any, info: TensorInfo) -> torch.Tensor:
        """The live tensor where it can take what was saved, else a new one."""
        if isinstance(own, torch.Tensor) and not is_composite(own):
            found = detached(own, like=self._capture.parameters[live])
            # Memory of another tensor would be read into twice.
            pointer = pointer_of(found) if global_shape(found) == info.shape else None
            if pointer is not None and (not pointer or pointer not in self._pointers):
                self._pointers.add(pointer)
                self._live_tensors[name] = own
                return found
        return self._made(live, field, info)

    def _made(self, live: str, field: str, info: TensorInfo, *, zeros: bool = False) -> torch.Tensor:
        parameter = self._capture.parameters[live]
        group, layout = self._groups[parameter], self._layout(live, field)
        return made(to_torch(info.dtype), info.shape, field, parameter, group, layout, zeros=zeros)

    def _layout(self, live: str, field: str) -> Mapping[str, Any]:
        return self._document.layouts.get(f"{self._saved_names[live]}.{field}", {})

    def _saved_parameter(self, live: str) -> TensorInfo | None:
        manifest = self._saved.manifest
        names = self._capture.full_names[live]
        found = (manifest.tensors.get(manifest.aliases.get(name, name)) for name in names)
        return next((info for info in found if info is not None), None)

    def _assign(self) -> Assigned:
        groups = zip(self._capture.group_names(), self._capture.optimizer.param_groups, strict=True)
        live = [live_group(names, group, self._saved_names) for names, group in groups]
        saved = [
            Group(names, {name: known(value) for name, value in group.items()})
            for group, names in zip(self._document.groups, self._document.names, strict=True)
        ]
        prefix = f"{self._capture.key}.param_groups."
        return assign(self._capture.key, live, saved, lambda name: self._takes_name(f"{prefix}{name}"))

    def _order_difference(self) -> list[str]:
        """What it tells by the position of parameters is right in the saved order only."""
        if self._document.own is None or not self._takes_all:
            return []
        names = self._capture.group_names()
        if [[self._saved_names.get(name) for name in group] for group in names] == self._document.names:
            return []
        kind = type(self._capture.optimizer).__name__
        return [
            f"{self._capture.key}: a {kind} saves its state by the position of its parameters, and these or "
            "their order differ from the saved run's; build it as the saved run did"
        ]

    def _plan_inner(self, stored: Iterable[str]) -> None:
        key, saved, live = self._capture.key, self._document.inner, self._capture.inner
        for name in sorted({*saved, *live}):
            if name not in live:
                self.lines.append(f"{key}: its {name} was an optimizer when saved, and is not one here")
            elif name not in saved:
                self.lines.append(f"{key}: its {name} is an optimizer here, and was not one when saved")
            else:
                one = OptimizerRestore(live[name], saved[name], stored, self._saved, self._wanted)
                self._inner.append(one)
                self.tensors |= one.tensors
                self.sources |= one.sources
                self.grown |= one.grown
                self.lines += one.lines
                self.unexpected += one.unexpected
        told = {*self.sources.values(), *self.unexpected}
        own = [name for name in values.tensor_names(self._document.own) if name not in told]
        self._saved.will_read([{"$tensor": name} for name in own], {})

    def finish(self) -> None:
        """Hand it all over, after the tensors were read.

        Raises: RestoreFailedError when the optimizer does not hold afterwards what was saved.
        """
        if not self._assigned.values:
            return
        for note in self._assigned.notes:
            log.warning("%s", note)
        groups = [
            {name: self._read_value(value) for name, value in group.items()}
            for group in self._assigned.values
        ]
        states = {live: self._state(live) for live in self._capture.local}
        told = self._told(groups, states) if self._capture.loads_itself and self._takes_all else None
        if told is not None:
            load_optimizer(self._capture.key, self._capture.optimizer, told)
        elif self._document.own is not None:
            log.warning(
                "%s: part of the optimizer is left out, so what its own state_dict() holds beside state and "
                "groups was not restored",
                self._capture.key,
            )
        self._set_state(states)
        self._set_extra()
        for group, assigned in zip(self._capture.optimizer.param_groups, groups, strict=True):
            set_values(group, assigned)
        for inner in self._inner:
            inner.finish()
        if told is not None and self._capture.saves_itself:
            self._check(told)

    def _state(self, live: str) -> Any:
        """What a parameter's state has to be."""
        name = self._saved_names.get(live, "")
        now = state_of(self._capture.optimizer).get(self._capture.parameters[live])
        if live in self._kept:
            return now if now is not None else {}
        if name in self._document.entries:
            return self._decoded(self._document.entries[name])
        state = {
            field: value
            for field, value in (now.items() if isinstance(now, dict) else ())
            if not self._takes(live, str(field))
        }
        fields = self._fields.get(live, {})
        state |= {field: self._live_tensors.get(at, self.tensors[at]) for field, at in fields.items()}
        nested = self._values.get(name, {}).items()
        return state | {field: self._decoded(value) for field, value in nested if self._takes(live, field)}

    def _told(self, groups: list[dict[str, Any]], states: Mapping[str, Any]) -> dict[Any, Any]:
        """The state dict for the optimizer's own load_state_dict."""
        own = self._document.own
        beyond = {} if own is None else with_parameters(self._from_own(own), self._parameters)
        if self._document.own_whole:
            return dict(beyond)
        numbers = {name: number for number, name in enumerate(self._capture.parameters)}
        told: dict[Any, Any] = {numbers[live]: state for live, state in states.items() if state}
        told |= self._extra()
        live_groups = zip(self._capture.hyperparameters(), groups, self._capture.group_names(), strict=True)
        return {
            **beyond,
            "state": told,
            "param_groups": [
                {**live, **assigned, "params": [numbers[name] for name in names]}
                for live, assigned, names in live_groups
            ],
        }

    def _from_own(self, own: Any) -> Any:
        found = self._read_tensors()
        for inner in self._inner:
            found |= inner._read_tensors()
        return values.decode(own, lambda name: found[name] if name in found else self._saved.tensors[name])

    def _read_tensors(self) -> dict[str, torch.Tensor]:
        """Saved name -> the state tensor that it was read into."""
        return {
            saved: self._live_tensors.get(name, self.tensors[name]) for name, saved in self.sources.items()
        }

    def _read_value(self, value: Any) -> Any:
        return self._saved.decoded(value.document) if isinstance(value, Unread) else copy.deepcopy(value)

    def _set_state(self, states: Mapping[str, Any]) -> None:
        state = state_of(self._capture.optimizer)
        for live, new in states.items():
            parameter = self._capture.parameters[live]
            now = state.get(parameter)
            if not isinstance(new, dict):
                state[parameter] = new
            elif isinstance(now, dict) and now is not new:
                in_order = {field: new[field] for field in now if field in new} | new
                now.clear()
                now.update(in_order)
            elif new:
                state[parameter] = new
        for live, new in states.items():
            parameter = self._capture.parameters[live]
            if isinstance(new, dict) and not new:
                state.pop(parameter, None)
            elif state.get(parameter) is None:
                raise RestoreFailedError(
                    f"{self._capture.key}: {type(self._capture.optimizer).__name__} does not keep the state "
                    f"that it is given for {live}; the state is now undefined"
                )

    def _set_extra(self) -> None:
        state, extra = state_of(self._capture.optimizer), self._extra()
        prefix = f"{self._capture.key}.state."
        for key in [key for key in (*state, *extra) if not isinstance(key, torch.Tensor)]:
            if not self._takes_name(f"{prefix}{key}"):
                continue
            if key in extra:
                state[key] = extra[key]
            else:
                state.pop(key, None)

    def _extra(self) -> dict[Any, Any]:
        found = {self._saved.decoded(key): self._decoded(value) for key, value in self._document.extra}
        named: dict[Any, Any] = with_parameters(found, self._parameters)
        return named

    def _decoded(self, value: Any) -> Any:
        found = self._saved.decoded(value)
        return with_parameters(found, self._parameters) if isinstance(found, dict | list | tuple) else found

    @cached_property
    def _parameters(self) -> dict[str, torch.Tensor]:
        """Saved name -> live parameter."""
        return {saved: self._capture.parameters[live] for live, saved in self._saved_names.items()}

    def _check(self, told: Mapping[Any, Any]) -> None:
        # By name: some put the id() of a parameter where others put its position.
        names = {parameter: name for name, parameter in self._parameters.items()}
        live = with_names(self._capture.optimizer.state_dict(), names)
        difference = first_difference(self._capture.key, with_names(told, names), live)
        if difference:
            raise RestoreFailedError(
                f"after its own load_state_dict, {difference}; the state is now undefined"
            )
