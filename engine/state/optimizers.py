"""The state of an optimizer under the canonical names of its parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from engine.errors import UnsavableValueError
from engine.state import optimizer_layouts as layouts
from engine.state import values
from engine.state.captured import Captured
from engine.state.composites import is_composite
from engine.state.local_boxes import detached
from engine.state.modules import ModuleCapture, Slot, pointer_of, same_tensors
from engine.state.optimizer_document import OptimizerDocument
from engine.state.optimizer_kinds import (
    class_name,
    inner_optimizers,
    loads_itself,
    local_part,
    saves_itself,
    state_of,
)
from engine.state.optimizer_state_dicts import beyond_base, with_names
from engine.state.parameter_names import ParameterNames, unknown_parameter


class OptimizerCapture:
    """The canonical names of an optimizer's state and groups.

    State tensors are named `<key>.state.<parameter>.<field>`. A parameter has its name within the module that
    owns all of the parameters, or its full name (`<module>.<parameter>`) where several entries own them.
    Values that are not tensors (hyperparameters, counters, nested values) are read again at each save. An
    optimizer has no state before its first step, and none is made for it.

    Attributes:
        owner: the state key of the module that owns all of the parameters, or "".
        full_names: name -> every full name of the parameter.
        parameters: name -> parameter, in group order.
        local: the parameters whose state this rank holds: all of them, unless the optimizer is sharded.
        inner: optimizers in its attributes, which have state of their own.
        saves_itself, loads_itself: whether it has a state_dict() or load_state_dict() of its own.
    """

    def __init__(self, key: str, optimizer: Optimizer, names: ParameterNames) -> None:
        self.key = key
        self.optimizer = optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self.owner = names.owner([parameter for group in self._groups for parameter in group])
        self.full_names: dict[str, list[str]] = {}
        self._names = self._named(names)
        self.parameters = {name: parameter for parameter, name in self._names.items()}
        self.local = self._local()
        self.saves_itself, self.loads_itself = saves_itself(optimizer), loads_itself(optimizer)
        self.inner = {
            name: OptimizerCapture(f"{key}.inner.{name}", inner, names)
            for name, inner in inner_optimizers(key, optimizer).items()
        }
        self.tensors: dict[str, torch.Tensor] = {}
        self._entries: list[Slot] = []
        self._counters: list[tuple[str, Any, str]] = []
        self._states: list[tuple[torch.Tensor, dict[str, Any], int]] = []
        self._whole: dict[str, torch.Tensor] = {}
        self._extra: list[Any] = []
        self._layouts: dict[str, dict[str, Any]] = {}
        self._walk()
        for inner in self.inner.values():
            self.tensors |= inner.tensors

    def _named(self, names: ParameterNames) -> dict[torch.Tensor, str]:
        found: dict[torch.Tensor, str] = {}
        for parameter in (parameter for group in self._groups for parameter in group):
            full = names.of(parameter)
            if self.owner:  # another module or a loose tensor may have it as well
                full = sorted(full, key=lambda name: not name.startswith(f"{self.owner}."))
            if not full:
                raise unknown_parameter(self.key, self.optimizer, parameter)
            found[parameter] = full[0].removeprefix(f"{self.owner}.") if self.owner else full[0]
            self.full_names[found[parameter]] = full
        return found

    def _local(self) -> dict[str, torch.Tensor]:
        part = local_part(self.optimizer)
        if part is None:
            return self.parameters
        mine = (parameter for group in part.param_groups for parameter in group["params"])
        return {self._names[parameter]: parameter for parameter in mine}

    def _walk(self) -> None:
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        paths: dict[int, list[str]] = {}
        for parameter, entry in state_of(self.optimizer).items():
            if not isinstance(parameter, torch.Tensor):
                self._extra.append(parameter)
                continue
            name = self._names.get(parameter)
            if name is None:
                raise unknown_parameter(self.key, self.optimizer, parameter)
            if not _is_plain(entry):
                self._whole[name] = parameter
                continue
            self._states.append((parameter, entry, len(entry)))
            for field, value in entry.items():
                path = f"{name}.{field}"
                if _is_one_tensor(value):
                    self._add_tensor(path, field, value, parameter, groups[parameter])
                    paths.setdefault(id(value), []).append(path)
                    self._entries.append((entry, field, value, pointer_of(value)))
                else:
                    self._counters.append((path, entry, field))
        for same in paths.values():
            for path in sorted(same)[1:]:
                self._layouts[path] = {**self._layouts.get(path, {}), layouts.SAME: min(same)}

    def _add_tensor(
        self, path: str, field: str, value: torch.Tensor, parameter: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        name = f"{self.key}.state.{path}"
        if name in self.tensors:
            raise UnsavableValueError(f"{name}: two parameters' state would have this name; rename one")
        self.tensors[name] = detached(value, like=parameter)
        layout = layouts.describe(field, value, parameter, group)
        if layout:
            self._layouts[path] = layout

    def unchanged(self) -> bool:
        """Whether every parameter and state tensor is still the same object in the same memory."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._groups):
            return False
        for group, seen in zip(groups, self._groups, strict=True):
            if len(group["params"]) != len(seen) or any(map(operator.is_not, group["params"], seen)):
                return False
        state = state_of(self.optimizer)
        if len(state) != len(self._states) + len(self._whole) + len(self._extra):
            return False
        # load_state_dict() gives every parameter a new entry and leaves the old entries unchanged.
        if any(
            state.get(parameter) is not entry or len(entry) != size for parameter, entry, size in self._states
        ):
            return False
        if any(_is_one_tensor(entry.get(field)) for _, entry, field in self._counters):
            return False
        if any(key not in state for key in self._extra):
            return False
        if any(p not in state or _is_plain(state[p]) for p in self._whole.values()):
            return False
        return same_tensors(self._entries) and all(inner.unchanged() for inner in self.inner.values())

    def guarded(self, modules: Mapping[str, ModuleCapture]) -> list[str]:
        """The names of all tensors that only this optimizer's step changes."""
        fixed = {name for module in modules.values() for name in module.tensors}
        parameters = (full[0] for full in self.full_names.values())
        return [*self.tensors, *(name for name in parameters if name in fixed)]

    def stateless(self) -> list[str]:
        """For each local parameter without state: the prefix that the names of its state would have."""
        has = {*self._whole, *(self._names[parameter] for parameter, entry, _ in self._states if entry)}
        return [f"{self.key}.state.{name}" for name in self.local if name not in has]

    def group_names(self) -> list[list[str]]:
        """The canonical parameter names of each group, in order."""
        return [[self._names[parameter] for parameter in group] for group in self._groups]

    def named_parameters(self) -> Iterable[tuple[torch.Tensor, str]]:
        """The optimizer's parameters with their canonical names, in group order."""
        return self._names.items()

    def collect_values(self, captured: Captured) -> None:
        """Add the groups' hyperparameters and the state that is not a tensor of a parameter."""
        captured.shared[self.key] = self._document(captured.tensors).to_json()

    def _document(self, tensors: dict[str, torch.Tensor]) -> OptimizerDocument:
        inner = {name: one._document(tensors).to_json() for name, one in self.inner.items()}
        state_dict = self._state_dict() if self.saves_itself else None
        state = state_of(self.optimizer)
        own, whole = None, False
        if state_dict is not None:
            beyond, whole = beyond_base(self.optimizer, state_dict)
            own = self._own(beyond, tensors) if beyond else None
        groups = []
        hyperparameters = zip(self.hyperparameters(state_dict), self.group_names(), strict=True)
        for number, (group, names) in enumerate(hyperparameters):
            encoded = values.encode(group, f"{self.key}.param_groups.{number}", tensors)
            groups.append({**encoded, "params": names})
        return OptimizerDocument(
            groups=groups,
            class_name=class_name(self.optimizer),
            sharded=local_part(self.optimizer) is not None,
            counters={
                path: self._encoded(entry.get(field), f"state.{path}", tensors)
                for path, entry, field in self._counters
            },
            layouts=self._layouts,
            entries={
                name: self._encoded(state[parameter], f"state.{name}", tensors)
                for name, parameter in self._whole.items()
            },
            extra=[
                [
                    values.encode(self._named_key(key), f"{self.key}.state", tensors),
                    self._encoded(state[key], f"extra.{number}", tensors),
                ]
                for number, key in enumerate(self._extra)
            ],
            inner=inner,
            own=own,
            own_whole=whole,
        )

    def _state_dict(self) -> dict[str, Any]:
        try:
            return self.optimizer.state_dict()
        except Exception as error:
            raise UnsavableValueError(
                f"{self.key}: state_dict() of {type(self.optimizer).__qualname__} failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def hyperparameters(self, state_dict: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The groups without parameters, and without what its own state_dict() (`state_dict`) leaves out."""
        if state_dict is None and self.saves_itself:
            state_dict = self._state_dict()
        groups = self.optimizer.param_groups
        found = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        saved = state_dict.get("param_groups") if state_dict is not None else None
        if isinstance(saved, list) and len(saved) == len(found):
            found = [
                {name: value for name, value in group.items() if name in kept}
                for group, kept in zip(found, saved, strict=True)
            ]
        return found

    def _encoded(self, value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
        if isinstance(value, dict | list | tuple):
            value = with_names(value, self._names)
        return values.encode(value, f"{self.key}.{path}", tensors)

    def _named_key(self, key: Any) -> Any:
        (found,) = with_names({key: None}, self._names)
        return found

    def _own(self, beyond: Any, tensors: dict[str, torch.Tensor]) -> Any:
        """JSON of what only its own state_dict() holds; state tensors in it are referred to by name."""
        found: dict[str, torch.Tensor] = {}
        encoded = values.encode(with_names(beyond, self._names), f"{self.key}.own", found)
        stored = {id(value): f"{self.key}.state.{name}" for name, value in self._state_tensors()}
        for inner in self.inner.values():
            stored |= {id(value): f"{inner.key}.state.{name}" for name, value in inner._state_tensors()}
        same = {name: stored[id(value)] for name, value in found.items() if id(value) in stored}
        tensors |= {name: value for name, value in found.items() if name not in same}
        return values.with_tensor_names(encoded, lambda name: same.get(name, name)) if same else encoded

    def _state_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        for parameter, entry, _ in self._states:
            for field, value in entry.items():
                if _is_one_tensor(value):
                    yield f"{self._names[parameter]}.{field}", value


def _is_one_tensor(value: Any) -> bool:
    """Whether a value is stored as one tensor; a composite one is stored as a value with several."""
    return isinstance(value, torch.Tensor) and not is_composite(value)


def _is_plain(entry: Any) -> bool:
    """Whether a parameter's state is a dict with text keys, as in torch's own optimizers."""
    return isinstance(entry, dict) and all(isinstance(field, str) for field in entry)
