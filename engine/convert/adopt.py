"""Turns a recognised foreign checkpoint into the draft of a Holdfast checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from engine.convert.foreign_optimizer import StateTensor, optimizer_parts, steps_of
from engine.convert.incoming import Incoming
from engine.convert.model_kinds import ConvertedModel, ModelKind, Windows, find_kind, names_of
from engine.convert.module_order import parameter_order
from engine.convert.numbering import Parameter, is_buffer, numbers_parameters, order_decides
from engine.convert.publish import Draft
from engine.convert.recognise import Recognised, recognise
from engine.convert.state_tree import EXTRA, TensorRef
from engine.convert.tensors import converted, transposed_windows, whole, windows_of
from engine.errors import DamagedError, StateError
from engine.format.manifest import TensorInfo
from engine.state.values import encode, tensor_names

_NO_KINDS = "no model kind is installed to convert it (the GPT-2 example, engine.gpt2, has one)"
_MODEL_ONLY = "it holds only a model: training can start from it (--init_from), but cannot resume"


@dataclass(slots=True)
class Adopted:
    """A draft under construction, with notes for the user."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    windows: dict[str, Windows] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, info: TensorInfo, windows: Windows) -> None:
        """Add a tensor under its name in the checkpoint."""
        self.tensors[name] = info
        self.windows[name] = windows

    def all_notes(self, found: Incoming) -> tuple[str, ...]:
        """All notes, in sentences; the names of what was left out come last."""
        left = [*self.left_out, *found.left_out]
        said = [f"left out: {', '.join(left)}"] if left else []
        return (*found.notes, *self.notes, *said)


def adopt(found: Incoming, kinds: Sequence[ModelKind] = ()) -> tuple[Draft, tuple[str, ...]]:
    """The draft of a checkpoint, and notes for the user.

    kinds: convert the models that they recognise; any other model is kept as it is.
    Raises: StateError if it has no model, or an incomplete one of a known kind; DamagedError.
    """
    parts = recognise(found.tree, found.what, lambda ref: _scalar(found, ref))
    return _adopt_export(found, parts) if parts.marker is not None else _adopt_foreign(found, parts, kinds)


def _scalar(found: Incoming, ref: TensorRef) -> Any:
    return whole(found.tensors, ref.name).item()


def _adopt_export(found: Incoming, parts: Recognised) -> tuple[Draft, tuple[str, ...]]:
    """One of our own exports: everything keeps its name."""
    marker, tree, adopted = parts.marker, parts.tree, Adopted()
    assert marker is not None

    def add(name: str, ref: Any) -> None:
        if not isinstance(ref, TensorRef):
            raise DamagedError(f"{found.what}: {name} is not a tensor")
        adopted.add(name, ref.info, lambda: found.tensors.windows(ref.name))

    for key in marker["modules"]:
        for name, ref in tree[key].items():
            if f"{key}.{name}" not in marker["aliases"]:
                add(f"{key}.{name}", ref)
    for key in marker["optimizers"]:
        names = _group_names(marker["objects"].get(key))
        known = set(names)
        for parameter, fields in tree[key].get("state", {}).items():
            name = names[parameter] if isinstance(parameter, int) and parameter < len(names) else parameter
            if name not in known or not isinstance(fields, Mapping):
                continue  # belongs to no parameter: stored among the values
            for field_name, ref in fields.items():
                full = f"{key}.state.{name}.{field_name}"
                if isinstance(ref, TensorRef) and full not in tree.get(EXTRA, {}):
                    add(full, ref)
    for name, ref in tree.get(EXTRA, {}).items():
        add(name, ref)
    needed = [*tensor_names(marker["objects"]), *tensor_names(marker["local"])]
    lacking = [n for n in needed if marker["aliases"].get(n, n) not in adopted.tensors]
    if lacking:
        raise DamagedError(f"{found.what} lacks the tensor {lacking[0]}, which one of its values refers to")
    draft = Draft(
        reason="import",
        step=marker["step"],
        epoch=marker["epoch"],
        tokens=marker["tokens"],
        metrics=marker["metrics"],
        tensors=adopted.tensors,
        windows=lambda name: adopted.windows[name](),
        aliases=marker["aliases"],
        objects=marker["objects"],
        local=marker["local"],
        config=marker["config"],
    )
    if not marker["optimizers"]:
        adopted.notes.append(_MODEL_ONLY)
    adopted.left_out += parts.left_out
    return draft, adopted.all_notes(found)


def _group_names(document: Any) -> list[str]:
    """The parameters of an optimizer's groups, in the order of a Holdfast export."""
    groups = document.get("param_groups", []) if isinstance(document, dict) else []
    return [str(name) for group in groups if isinstance(group, dict) for name in group.get("params", [])]


def _adopt_foreign(
    found: Incoming, parts: Recognised, kinds: Sequence[ModelKind]
) -> tuple[Draft, tuple[str, ...]]:
    adopted = Adopted(notes=list(parts.notes), left_out=list(parts.left_out))
    kind = find_kind(kinds, parts.model, parts.config)
    model = kind.convert(found.tensors, parts, found.what) if kind is not None else None
    if model is not None:
        _add_converted(adopted, model)
    else:
        _add_model(adopted, found, parts, kinds)
    step = _step(adopted, found, parts)
    # torch.save keeps the module's order of parameters, and a kind knows it.
    in_order = model is not None or found.kind == "pt" or _put_in_order(adopted, parts)
    state_dtype = model.state_dtype if model is not None else None
    objects = _add_optimizer(adopted, found, parts, in_order=in_order, state_dtype=state_dtype)
    local: Mapping[str, Any] = {}
    if objects and kind is not None:
        more = kind.resumable(parts, step, adopted.add)
        objects, local = {**objects, **more.objects}, more.local
        adopted.notes += more.notes
    elif not objects:
        adopted.notes.append(_MODEL_ONLY)
    draft = Draft(
        reason="import",
        step=step,
        epoch=parts.epoch,
        tokens=parts.tokens,
        metrics=parts.metrics,
        tensors=adopted.tensors,
        windows=lambda name: adopted.windows[name](),
        aliases=adopted.aliases,
        objects=objects,
        local=local,
        config=parts.config if model is None else model.config,
    )
    return draft, adopted.all_notes(found)


def _put_in_order(adopted: Adopted, parts: Recognised) -> bool:
    """Sort the parameters in the module's order, if an optimizer needs it and the module's class is known."""
    if parts.optimizer is None or not numbers_parameters(parts.optimizer):
        return False
    order = parameter_order(parts.config, parts.names, len(parts.model))
    if order is None or not adopted.parameters.keys() >= set(order):
        return False
    rest = {name: replace(known, is_buffer=True) for name, known in adopted.parameters.items()}
    adopted.parameters = {**{name: adopted.parameters[name] for name in order}, **_without(rest, order)}
    return True


def _without(parameters: Mapping[str, Parameter], names: Sequence[str]) -> dict[str, Parameter]:
    return {name: parameter for name, parameter in parameters.items() if name not in set(names)}


def _step(adopted: Adopted, found: Incoming, parts: Recognised) -> int:
    """The recorded step, or else the optimizer's step count."""
    if parts.step is not None:
        return parts.step
    counted = parts.optimizer and steps_of(parts.optimizer, lambda ref: _scalar(found, ref))
    if counted:
        adopted.notes.append(f"it does not record its step: {counted} is its optimizer's count")
    return counted or 0


def _add_converted(adopted: Adopted, model: ConvertedModel) -> None:
    for name, info in model.infos.items():
        adopted.add(f"model.{name}", info, partial(model.windows, name))
    adopted.parameters |= model.parameters
    adopted.notes += model.notes


def _add_model(adopted: Adopted, found: Incoming, parts: Recognised, kinds: Sequence[ModelKind]) -> None:
    """Add a model of no known kind unchanged; a tensor with several names is stored under the first."""
    why = f"its model is not a {names_of(kinds)}" if kinds else _NO_KINDS
    adopted.notes.append(f"{why}: the tensors keep their names, dtypes and layout")
    first: dict[int, str] = {}
    for name, ref in parts.model.items():
        stored = first.setdefault(id(ref), name)
        if stored != name:
            adopted.aliases[f"model.{name}"] = f"model.{stored}"
            continue
        adopted.add(f"model.{name}", ref.info, _reader(found, ref))
        shape = ref.info.shape
        adopted.parameters[name] = Parameter(shape, shape, is_buffer=is_buffer(name, ref.info.dtype))


def _reader(found: Incoming, ref: TensorRef) -> Windows:
    return lambda: found.tensors.windows(ref.name)


def _add_optimizer(
    adopted: Adopted, found: Incoming, parts: Recognised, *, in_order: bool, state_dtype: str | None
) -> dict[str, Any]:
    """Add the optimizer's state; returns its JSON by state key, empty without a usable optimizer.

    state_dtype: converts its floating-point tensors like the weights: moments have the weights' type.
    """
    if parts.optimizer is None:
        return {}

    def scalar(ref: TensorRef) -> Any:
        return _scalar(found, ref)

    try:
        result = optimizer_parts(
            parts.optimizer, adopted.parameters, scalar, names=parts.names, in_order=in_order
        )
    except StateError as error:
        adopted.notes.append(f"its optimizer was left out: {error}")
        return {}
    if numbers_parameters(parts.optimizer) and order_decides(parts.optimizer, adopted.parameters):
        adopted.notes.append(
            "its optimizer only numbers its parameters, and several have the same shape: the import assumes "
            "the model's order, as in an optimizer over model.parameters()"
        )
    adopted.left_out += [f"optimizer.{path}" for path in result.left_out]
    for name, tensor in result.tensors.items():
        info = converted(tensor.info, state_dtype)
        adopted.add(f"optimizer.state.{name}", info, _state_reader(found, tensor))
    return {"optimizer": encode(dict(result.document), "optimizer", {})}


def _state_reader(found: Incoming, tensor: StateTensor) -> Windows:
    ref, number = tensor.ref, tensor.number
    if ref is None:
        return lambda: windows_of(torch.tensor(number))
    if tensor.transposed:
        return lambda: transposed_windows(found.tensors, ref.name)
    return _reader(found, ref)
