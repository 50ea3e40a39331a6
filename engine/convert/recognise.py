"""Finds the model, the optimizer and the step in a foreign tree. Pure.

Supported: Holdfast's own exports (by their marker), nanoGPT's `ckpt.pt`, Lightning's `.ckpt`, DeepSpeed's
model states, torchtitan's DCP, scripts that save `model`, `optimizer`, `step`, ..., bare state dicts, and the
result of DCP's `get_state_dict`. `left_out` names everything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.convert.elsewhere import refuse_part
from engine.convert.flattened import nested_optimizer
from engine.convert.marker import added_keys, read_marker
from engine.convert.parameter_names import Names, shared_names
from engine.convert.state_tree import TensorRef, Unheld
from engine.directory.record import VAL_LOSS
from engine.errors import StateError
from engine.format.names import MAX_NAME_BYTES

Scalar = Callable[[TensorRef], bool | int | float | complex]
"""Reads the value of a one-element tensor."""

_MODELS = ("model", "state_dict", "model_state_dict", "module", "model_state", "weights", "params")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states", "optimizer_state", "opt")
_STEPS = ("step", "iter_num", "global_step", "global_steps", "iteration", "iter", "steps", "n_iter")
_EPOCHS = ("epoch", "current_epoch")
_TOKENS = ("tokens", "ntokens_seen")
_LOSSES = (VAL_LOSS, "best_val_loss")
_PLAIN_LOSSES = (*_LOSSES, "loss", "train_loss", "best_loss")
_CONFIGS = ("config", "model_args", "hparams", "args", "hyper_parameters", "cfg", "opt_args")
_METRIC = re.compile(
    r"(?:^|.*_)(?:loss|acc|accuracy|ppl|perplexity|score|metric|f1|bleu|auc)\d*(?:_.*|$)", re.IGNORECASE
)
_HOLDERS = ("train_state",)
"""Dicts whose entries count as the checkpoint's own (torchtitan). See `_checkpoints_in` for others."""

_MAX_COUNT = 10**18

_SHARDS = ("class DTensor)", "class ShardedTensor)")
"""Endings of the description of a tensor that is one rank's shard."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """A foreign checkpoint's parts.

    model: canonical parameter name -> tensor; names: maps the checkpoint's names to these.
    optimizer: its state and groups, as saved.
    step: None if unknown.
    metrics: val_loss and other losses and scores, by their own names.
    marker: the marker of a Holdfast export, whose layout `tree` then has.
    config: plain JSON values of the script's configuration.
    left_out: everything else, each with its path and, in parentheses, what it is.
    notes: what was converted, in sentences.
    """

    model: Mapping[str, TensorRef]
    names: Names = field(default_factory=Names)
    optimizer: Mapping[str, Any] | None = None
    step: int | None = None
    epoch: int = 0
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    marker: Mapping[str, Any] | None = None
    tree: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def recognise(tree: Mapping[str, Any], what: str, scalar: Scalar) -> Recognised:
    """Find the parts. StateError, with the contents, if there is no model; DamagedError."""
    marker = read_marker(tree, what)
    if marker is not None:
        left = tuple(added_keys(tree, marker))
        return Recognised({}, config=marker["config"], marker=marker, tree=tree, left_out=left)
    return _Sorting(tree, what, scalar).result()


def tensors_by_name(
    value: Mapping[Any, Any], what: str, *, are_the_modules: bool = False
) -> tuple[dict[str, TensorRef], Names, list[str]]:
    """(tensors by the model's names, the mapping to those names, what is not a tensor) of a state dict.

    are_the_modules: see `shared_names`.
    Nested dicts give dotted names. StateError if two names become one.
    """
    flat, others = _flat(value)
    names = shared_names(list(flat), are_the_modules=are_the_modules)
    found: dict[str, TensorRef] = {}
    for name, ref in flat.items():
        if found.setdefault(names.of(name), ref) is not ref:
            raise StateError(f"{what} holds two tensors called {names.of(name)}")
    return found, names, others


def is_optimizer(value: Any) -> bool:
    """Whether it has the form of an optimizer's `state_dict()`."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in value["param_groups"])
    )


class _Sorting:
    """Takes one part after another from a tree; what remains is left out."""

    def __init__(self, tree: Mapping[str, Any], what: str, scalar: Scalar) -> None:
        self._what = what
        self._scalar = scalar
        self._left = dict(tree)
        self._paths: dict[str, str] = {}
        for holder in (*_HOLDERS, *_checkpoints_in(tree)):
            inner = tree.get(holder)
            if isinstance(inner, Mapping) and not any(isinstance(key, int) for key in inner):
                del self._left[holder]
                for key, value in inner.items():
                    name = key if key not in self._left else f"{holder}.{key}"
                    self._left[name] = value
                    self._paths[name] = f"{holder}.{key}"
        self._settings: Mapping[str, Any] = {}
        self._also: list[str] = []
        self._notes: list[str] = []

    def result(self) -> Recognised:
        refuse_part(self._left, self._what)
        if _optimizer_in(self._left) is not None and self._is_bare():
            raise StateError(
                f"{self._what} holds an optimizer's state but no model: give the model's file, or the "
                "directory that holds both"
            )
        config = self._settings = self._config()
        step = self._count(_STEPS)
        epoch, tokens = self._count(_EPOCHS), self._count(_TOKENS)
        metrics = self._metrics()
        model, names = self._model()
        optimizer = self._optimizer(names, model)
        left = [self._paths.get(key, key) + _described(value) for key, value in self._left.items()]
        return Recognised(
            model=model,
            names=names,
            optimizer=optimizer,
            step=step,
            epoch=epoch or 0,
            tokens=tokens or 0,
            metrics=metrics,
            config=config,
            left_out=(*left, *self._also),
            notes=(*names.notes, *self._notes),
        )

    def _number(self, key: str) -> int | float | None:
        """The number at a key, even if it is a tensor of one element."""
        value = self._plain(self._left.get(key))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number else None

    def _plain(self, value: Any) -> Any:
        """The number in a tensor of one element; any other value unchanged."""
        single = isinstance(value, TensorRef) and value.info.shape in ((), (1,))
        return self._scalar(value) if single else value

    def _count(self, keys: tuple[str, ...]) -> int | None:
        for key in keys:
            value = self._number(key)
            if value is not None and value == value and 0 <= value < _MAX_COUNT:
                if value != int(value):
                    self._notes.append(f"its {key} {value:g} was rounded down to {int(value)}")
                self._take_number(key)
                return int(value)
        return None

    def _metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        # In a bare state dict, a tensor called a loss may be a parameter.
        bare = self._is_bare()
        scores = [key for key in self._left if _METRIC.fullmatch(key) and (not bare or key in _PLAIN_LOSSES)]
        for key in (*_LOSSES, *scores):
            value = self._number(key)
            name = VAL_LOSS if key in _LOSSES else key
            if value is not None and name not in metrics and len(name) <= MAX_NAME_BYTES:
                metrics[name] = float(value)
                self._take_number(key)
        return metrics

    def _take_number(self, key: str) -> None:
        """Take a number. In a bare state dict it could also be a buffer, so a note says so."""
        if isinstance(self._left.pop(key), TensorRef) and self._is_bare():
            self._notes.append(f"its tensor {key!r} was read as the training's {key}, not the model's")

    def _is_bare(self) -> bool:
        """Whether the model's tensors are at the top level, beside everything else."""
        return not any(_has_tensors(self._left.get(key)) for key in _MODELS)

    def _config(self) -> dict[str, Any]:
        """All configurations merged, as far as they are JSON; the model's own arguments win."""
        merged: dict[str, Any] = {}
        for name in _CONFIGS:
            value = self._left.get(name)
            if isinstance(value, Mapping):
                found = {str(key): _json(self._plain(item)) for key, item in value.items()}
                merged |= {key: item for key, item in found.items() if item is not None}
                self._also += [
                    f"{name}.{key}{_described(item)}"
                    for key, item in value.items()
                    if item is not None and found[str(key)] is None
                ]
                del self._left[name]
        return merged

    def _model(self) -> tuple[dict[str, TensorRef], Names]:
        candidates = [key for key in _MODELS if _has_tensors(self._left.get(key))]
        for key in _MODELS:
            if isinstance(self._left.get(key), Mapping):
                refuse_shards({}, _flat(self._left[key])[1], self._what)
        roots = [key for key, value in self._left.items() if isinstance(value, TensorRef)]
        if candidates:
            return self._take_model(candidates[0], self._left.pop(candidates[0]))
        # Tensors of integers alone are no model: they may be random states.
        if any(self._left[key].info.dtype.startswith(("F", "BF", "C")) for key in roots):
            values = {key: self._left.pop(key) for key in roots}
            return self._take_model("", values)
        others = [k for k, v in self._left.items() if _has_tensors(v) and _optimizer_in(v) is None]
        others = [key for key in others if "optim" not in key and "sched" not in key]
        if len(others) == 1:
            self._notes.append(f"{others[0]!r} is taken as the model")
            return self._take_model(others[0], self._left.pop(others[0]))
        entries = list(self._left.items())[:20]
        there = (
            ", ".join(str(key)[:MAX_NAME_BYTES] + _described(value) for key, value in entries) or "nothing"
        )
        if not any(_has_tensors(value) for value in self._left.values()):
            raise StateError(f"{self._what} holds no tensors: it has {there}. Give a file with weights")
        raise StateError(
            f"{self._what} holds no model that can be recognised: it has {there}, but no 'model'. "
            "Save the model's state_dict() under the key 'model'"
        )

    def _take_model(self, key: str, value: Mapping[Any, Any]) -> tuple[dict[str, TensorRef], Names]:
        hugging_face = "architectures" in self._settings
        model, names, others = tensors_by_name(value, self._what, are_the_modules=hugging_face)
        self._also += [f"{key}.{other}" if key else other for other in others]
        refuse_shards(model, others, self._what)
        return model, names

    def _optimizer(self, names: Names, model: Mapping[str, TensorRef]) -> Mapping[str, Any] | None:
        usual = [key for key in _OPTIMIZERS if key in self._left]
        others = [key for key in self._left if key not in usual and "optim" in key.lower()]
        for key in (*usual, *others):
            found = _optimizer_in(self._left[key])
            if found is None and isinstance(self._left[key], Mapping):
                found = nested_optimizer(self._left[key], names, model, self._scalar)
            if found is not None:
                del self._left[key]
                return found
        return None


def refuse_shards(model: Mapping[str, TensorRef], others: Sequence[str], what: str) -> None:
    """Raises StateError if a sharding tool's tensors are there instead of the model's own."""
    shard = next((other for other in others if other.endswith(_SHARDS)), None)
    if shard is not None:
        raise StateError(
            f"{what} holds one rank's shards, not a model: {shard[:120]}. Save it with DCP, or save the "
            "result of torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
        )
    flat = next((name for name in model if name.rpartition(".")[2].startswith("_flat_param")), None)
    if flat is not None:
        raise StateError(
            f"{what} holds FSDP's flattened shards ({flat[:80]}), not the model's own tensors: save it with "
            "StateDictType.FULL_STATE_DICT or with DCP, or run `accelerate merge-weights` on a sharded "
            "directory of Accelerate"
        )
    empty = [n for n, ref in model.items() if ref.info.shape == (0,) and n.endswith(("weight", "bias"))]
    if empty:
        raise StateError(
            f"{what} holds empty tensors ({empty[0][:80]} and {len(empty) - 1} more): DeepSpeed ZeRO-3 keeps "
            f"their values in its optimizer files. {ZERO_TO_FP32}"
        )


ZERO_TO_FP32 = (
    "`python zero_to_fp32.py . consolidated --safe_serialization`, run in the folder where DeepSpeed put "
    "that script, merges the weights; then import `consolidated`"
)


def _optimizer_in(value: Any) -> Mapping[str, Any] | None:
    """The optimizer in a value, perhaps alone in a list, as Lightning keeps it."""
    if is_optimizer(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, Mapping) and isinstance(value.get("state"), list):  # DCP made it a list
        return _optimizer_in({**value, "state": dict(enumerate(value["state"]))})
    if isinstance(value, Mapping) and set(value) == {
        "param_groups"
    }:  # never stepped: DCP drops empty dicts
        return _optimizer_in({**value, "state": {}})
    if isinstance(value, list | tuple) and len(value) == 1:
        return _optimizer_in(value[0])
    return None


def _flat(value: Mapping[Any, Any]) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors of a nested dict by dotted names, and the names of other values."""
    tensors: dict[str, TensorRef] = {}
    others: list[str] = []
    for key, item in value.items():
        if isinstance(item, TensorRef):
            tensors[str(key)] = item
        elif isinstance(item, Mapping) and item:
            inner, more = _flat(item)
            tensors |= {f"{key}.{name}": ref for name, ref in inner.items()}
            others += [f"{key}.{name}" for name in more]
        else:
            others.append(f"{key}{_described(item)}")
    return tensors, others


def _checkpoints_in(tree: Mapping[str, Any]) -> list[str]:
    """The one entry that holds the whole checkpoint, as in `{"app": AppState(...)}` in DCP's tutorial."""
    if any(isinstance(value, TensorRef) or key in _MODELS for key, value in tree.items()):
        return []
    found = [key for key, value in tree.items() if isinstance(value, Mapping) and _is_checkpoint(value)]
    return found if len(found) == 1 else []


def _is_checkpoint(value: Mapping[Any, Any]) -> bool:
    models = (value.get(key) for key in _MODELS)
    if not any(isinstance(model, Mapping) and _has_tensors(model) for model in models):
        return False
    return any(key in value for key in (*_OPTIMIZERS, *_STEPS, *_EPOCHS))


def _has_tensors(value: Any) -> bool:
    if isinstance(value, TensorRef):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_tensors, value))


def _described(value: Any) -> str:
    """A description of a value, in parentheses; empty if its name suffices."""
    if isinstance(value, Unheld):
        return f" ({value.words})"
    unheld = _first_unheld(value)
    return f" (contains {unheld})" if unheld else ""


def _first_unheld(value: Any) -> str:
    items: list[Any] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    found = []
    for key, item in items:
        inner = item.words if isinstance(item, Unheld) else _first_unheld(item)
        if inner:
            found.append(f"{key}: {inner}")
    return "; ".join(found)


def _json(value: Any) -> Any:
    if isinstance(value, bool | str) or (isinstance(value, int | float) and value == value):
        finite = not isinstance(value, float) or abs(value) != float("inf")
        return value if finite and (not isinstance(value, int) or abs(value) < 2**63) else None
    if isinstance(value, list | tuple):
        items = [None if item is None else _json(item) for item in value]
        whole = all(one is None or two is not None for one, two in zip(value, items, strict=True))
        return items if whole else None
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        entries = {key: _json(item) for key, item in value.items()}
        return entries if all(entries[k] is not None or value[k] is None for k in entries) else None
    return None
