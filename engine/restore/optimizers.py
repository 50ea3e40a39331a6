"""The optimizers of a state: what each one reads of a checkpoint, and how it gets it afterwards."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from engine.errors import RestoreFailedError
from engine.restore.filters import Filter
from engine.restore.matching import Match
from engine.restore.optimizer_matching import Unread
from engine.restore.optimizer_plan import OptimizerPlan
from engine.restore.saved import Saved
from engine.state import values
from engine.state.capture import StateCapture
from engine.state.optimizer_document import is_optimizer, parse
from engine.state.optimizer_kinds import state_of
from engine.state.optimizer_state_dicts import first_difference, with_names, with_parameters

log = logging.getLogger(__name__)


class Optimizers:
    """The wanted optimizers, each with what the checkpoint has for it. Nothing changes before `finish`.

    Attributes:
        tensors: what to read, by a name of the destination.
        match: how the saved state fits.
    """

    def __init__(self, capture: StateCapture, saved: Saved, filter: Filter) -> None:
        self._plans: list[OptimizerPlan] = []
        self.tensors: dict[str, torch.Tensor] = {}
        matched: dict[str, str] = {}
        grown: dict[str, str] = {}
        differences: list[str] = []
        unexpected: list[str] = []
        for key, one in capture.optimizers.items():
            document = saved.manifest.objects.get(key)
            if filter.model_only or key not in saved.keys or not _takes_some(filter, key, document, saved):
                continue
            if not isinstance(document, dict) or "param_groups" not in document:
                differences.append(f"{key}: an optimizer here, saved as something else")
                continue
            known = [name for name in saved.manifest.tensors if name.startswith(f"{key}.")]
            plan = OptimizerPlan(one, document, known, saved, filter)
            self._plans.append(plan)
            self.tensors |= plan.tensors
            matched |= plan.sources
            grown |= plan.grown
            differences += plan.differences
            unexpected += plan.unexpected
        self.match = Match(matched, (), tuple(unexpected), tuple(differences), grown)

    def finish(self) -> None:
        """Hand every optimizer its state, after all tensors were read.

        Raises: RestoreFailedError when an optimizer does not hold what was saved afterwards.
        """
        for plan in self._plans:
            _HandOver(plan).finish()


def _takes_some(filter: Filter, key: str, document: Any, saved: Saved) -> bool:
    if filter.takes_key(key):
        return True
    names = [name for name in saved.manifest.tensors if name.startswith(f"{key}.")]
    if is_optimizer(document):
        parsed = parse(key, document)
        names += [f"{key}.param_groups.{name}" for group in parsed.groups for name in group]
        names += [f"{key}.state.{path}" for path in parsed.counters]
        names += [f"{key}.state.{name}" for name, _ in parsed.extra]
    return any(filter.takes_value(key, name) for name in names)


class _HandOver:
    """Gives one optimizer the state that its plan has read."""

    def __init__(self, plan: OptimizerPlan) -> None:
        self._plan = plan
        self._capture = plan.capture
        self._document = plan.document
        self._saved = plan.saved
        self._optimizer = plan.capture.optimizer
        live = plan.capture.parameters
        self._parameters = {saved: live[name] for name, saved in plan.saved_names.items()}
        """Saved name -> live parameter."""

    def finish(self) -> None:
        """Set state and groups, also of inner optimizers; by its own load_state_dict() where there is one."""
        plan, key = self._plan, self._capture.key
        if not plan.assigned.values:
            return
        for note in plan.assigned.notes:
            log.warning("%s", note)
        groups = [
            {name: self._group_value(value) for name, value in group.items()}
            for group in plan.assigned.values
        ]
        states = {live: self._state(live) for live in self._capture.local}
        loaded = self._state_dict(groups, states) if self._capture.loads_itself and plan.takes_all else None
        if loaded is not None:
            self._load(loaded)
        elif self._document.own is not None:
            log.warning(
                "%s: part of the optimizer is left out, so what its own state_dict() holds besides state and "
                "groups was not restored",
                key,
            )
        self._set_state(states)
        self._set_extra()
        for group, assigned in zip(self._optimizer.param_groups, groups, strict=True):
            set_values(group, assigned)
        for inner in plan.inner:
            _HandOver(inner).finish()
        if loaded is not None and self._capture.saves_itself:
            self._check(loaded)

    def _group_value(self, value: Any) -> Any:
        return self._saved.decoded(value.document) if isinstance(value, Unread) else copy.deepcopy(value)

    def _state(self, live: str) -> Any:
        """The state that a parameter gets."""
        plan, name = self._plan, self._plan.saved_names.get(live, "")
        now = state_of(self._optimizer).get(self._capture.parameters[live])
        if live in plan.kept:
            return now if now is not None else {}
        if name in self._document.entries:
            return self._decoded(self._document.entries[name])
        state = {
            field: value
            for field, value in (now.items() if isinstance(now, dict) else ())
            if not plan.takes_field(live, str(field))
        }
        fields = plan.fields.get(live, {})
        state |= {field: plan.live_tensors.get(at, plan.tensors[at]) for field, at in fields.items()}
        nested = plan.values.get(name, {}).items()
        return state | {
            field: self._decoded(value) for field, value in nested if plan.takes_field(live, field)
        }

    def _state_dict(self, groups: list[dict[str, Any]], states: Mapping[str, Any]) -> dict[Any, Any]:
        """The state dict for the optimizer's own load_state_dict()."""
        own = self._document.own
        beyond = {} if own is None else with_parameters(self._decoded_own(own), self._parameters)
        if self._document.own_whole:
            return dict(beyond)
        numbers = {name: number for number, name in enumerate(self._capture.parameters)}
        numbered: dict[Any, Any] = {numbers[live]: state for live, state in states.items() if state}
        live_groups = zip(self._capture.hyperparameters(), groups, self._capture.group_names(), strict=True)
        return {
            **beyond,
            "state": numbered | self._extra(),
            "param_groups": [
                {**live, **assigned, "params": [numbers[name] for name in names]}
                for live, assigned, names in live_groups
            ],
        }

    def _decoded_own(self, own: Any) -> Any:
        found = {name: tensor for plan in (self._plan, *self._plan.inner) for name, tensor in _read(plan)}
        return values.decode(own, lambda name: found[name] if name in found else self._saved.tensors[name])

    def _load(self, state_dict: dict[Any, Any]) -> None:
        try:
            self._optimizer.load_state_dict(state_dict)
        except Exception as error:
            raise RestoreFailedError(
                f"{self._capture.key}: load_state_dict() of {type(self._optimizer).__qualname__} did not "
                f"accept what was saved, and the state is now undefined: {type(error).__name__}: {error}"
            ) from error

    def _set_state(self, states: Mapping[str, Any]) -> None:
        state = state_of(self._optimizer)
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
                    f"{self._capture.key}: {type(self._optimizer).__name__} does not keep the state "
                    f"that it is given for {live}; the state is now undefined"
                )

    def _set_extra(self) -> None:
        """Set the state under keys that are not parameters."""
        state, extra = state_of(self._optimizer), self._extra()
        prefix = f"{self._capture.key}.state."
        for key in [key for key in (*state, *extra) if not isinstance(key, torch.Tensor)]:
            if not self._plan.takes(f"{prefix}{key}"):
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

    def _check(self, loaded: Mapping[Any, Any]) -> None:
        # By name: some optimizers put the id() of a parameter where others put its position.
        names = {parameter: name for name, parameter in self._parameters.items()}
        live = with_names(self._optimizer.state_dict(), names)
        difference = first_difference(self._capture.key, with_names(loaded, names), live)
        if difference:
            raise RestoreFailedError(
                f"after its own load_state_dict, {difference}; the state is now undefined"
            )


def _read(plan: OptimizerPlan) -> list[tuple[str, torch.Tensor]]:
    """(saved name, the state tensor that it was read into) of every tensor."""
    return [(saved, plan.live_tensors.get(name, plan.tensors[name])) for name, saved in plan.sources.items()]


def set_values(group: dict[str, Any], assigned: Mapping[str, Any]) -> None:
    """Set a live group's values. A tensor (a capturable learning rate) is filled in place where it can be."""
    for name, value in assigned.items():
        live = group.get(name)
        number = isinstance(value, int | float)
        same = isinstance(value, torch.Tensor) and isinstance(live, torch.Tensor)
        if isinstance(live, torch.Tensor) and (
            (number and not live.ndim) or (same and (live.dtype, live.shape) == (value.dtype, value.shape))
        ):
            with torch.no_grad():
                live.copy_(value) if same else live.fill_(value)
        else:
            group[name] = value.clone() if isinstance(value, torch.Tensor) else value
