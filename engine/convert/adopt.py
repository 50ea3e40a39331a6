"""From a recognised foreign checkpoint to the draft of one of ours."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.catalog.record import VAL_LOSS
from engine.convert.gpt2 import Gpt2Tensors, find_gpt2, looks_like_gpt2, transposed_windows
from engine.convert.incoming import Incoming
from engine.convert.optimizer import Shape, StateTensor, optimizer_parts
from engine.convert.publish import Draft
from engine.convert.recognise import Recognised, recognise
from engine.convert.state_tree import EXTRA, TensorRef
from engine.convert.tensors import is_float, whole, windows_of
from engine.errors import DamagedError, StateError
from engine.format.manifest import TensorInfo
from engine.snapshot.captured import RNG_KEY, per_rank_name
from engine.snapshot.values import encode, tensor_names
from model.config import PRESETS, GPT2Config

Windows = Callable[[], Iterator[torch.Tensor]]

_SEED = 1337
_NO_FINGERPRINT = "imported"

_COUNTS = {
    "block_size": "seq_len",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "lr_decay_steps",
    "max_iters": "max_steps",
    "seed": "seed",
}
_RATES = {
    "learning_rate": "lr",
    "min_lr": "min_lr",
    "weight_decay": "weight_decay",
    "grad_clip": "grad_clip",
    "dropout": "dropout",
}
"""nanoGPT's names of our trainer's flags: those that count something, and the others."""


@dataclass(slots=True)
class Adopted:
    """A draft in the making, and what its user should know about it."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    windows: dict[str, Windows] = field(default_factory=dict)
    parameters: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, info: TensorInfo, windows: Windows) -> None:
        """Add a tensor under its name in the checkpoint."""
        self.tensors[name] = info
        self.windows[name] = windows


def adopt(found: Incoming) -> tuple[Draft, tuple[str, ...]]:
    """The draft of a checkpoint, and notes in whole sentences.

    Raises: StateError when there is no model in it, or a GPT-2 that is not whole; DamagedError.
    """
    parts = recognise(found.tree, found.what)
    return _adopt_export(found, parts) if parts.marker is not None else _adopt_foreign(found, parts)


def _adopt_export(found: Incoming, parts: Recognised) -> tuple[Draft, tuple[str, ...]]:
    """One of our own exports: everything under its old name."""
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
        for parameter, fields in tree[key].get("state", {}).items():
            name = names[parameter] if isinstance(parameter, int) and parameter < len(names) else parameter
            for field_name, ref in fields.items():
                if isinstance(ref, TensorRef):
                    add(f"{key}.state.{name}.{field_name}", ref)
    for name, ref in tree.get(EXTRA, {}).items():
        add(name, ref)
    needed = [*tensor_names(marker["objects"]), *tensor_names(marker["local"])]
    lacking = [n for n in needed if marker["aliases"].get(n, n) not in adopted.tensors]
    if lacking:
        raise DamagedError(f"{found.what} lacks the tensor {lacking[0]}, to which one of its values refers")
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
    return draft, tuple(adopted.notes)


_MODEL_ONLY = "it holds a model only: training can start from it (--init_from), but not resume it"


def _group_names(document: Any) -> list[str]:
    """The parameters of an optimizer's groups, in order, as a Holdfast export lists them."""
    groups = document.get("param_groups", []) if isinstance(document, dict) else []
    return [str(name) for group in groups if isinstance(group, dict) for name in group.get("params", [])]


def _adopt_foreign(found: Incoming, parts: Recognised) -> tuple[Draft, tuple[str, ...]]:
    adopted = Adopted()
    config = dict(parts.config)
    if looks_like_gpt2(parts.model):
        config = _add_gpt2(adopted, found, parts)
    else:
        adopted.notes.append("its model is no GPT-2: the tensors keep their names, dtypes and layout")
        for name, ref in parts.model.items():
            adopted.add(f"model.{name}", ref.info, _reader(found, ref))
            adopted.parameters[name] = ref.info.shape, ref.info.shape
    objects = _add_optimizer(adopted, found, parts)
    local: dict[str, Any] = {}
    if objects:
        objects |= _resumable(parts)
        local[RNG_KEY] = _fresh_generators(adopted)
        adopted.notes.append(
            "it says nothing about the data: a resumed run starts at the beginning of its own, with fresh "
            "random streams, and has to be told so with --allow_data_change"
        )
    else:
        adopted.notes.append(_MODEL_ONLY)
    draft = Draft(
        reason="import",
        step=parts.step,
        epoch=parts.epoch,
        tokens=parts.tokens,
        metrics={} if parts.val_loss is None else {VAL_LOSS: parts.val_loss},
        tensors=adopted.tensors,
        windows=lambda name: adopted.windows[name](),
        objects=objects,
        local=local,
        config=config,
    )
    return draft, tuple(adopted.notes)


def _reader(found: Incoming, ref: TensorRef) -> Windows:
    return lambda: found.tensors.windows(ref.name)


def _add_gpt2(adopted: Adopted, found: Incoming, parts: Recognised) -> dict[str, Any]:
    """Add a GPT-2 in our layout, as float32 like the trainer's weights; returns the run's configuration."""
    names = {name: ref.name for name, ref in parts.model.items()}
    gpt2 = find_gpt2(found.tensors, names, parts.config, found.what)
    model = Gpt2Tensors(found.tensors, gpt2)
    model.check_tied(found.what)
    narrow = sorted({info.dtype for info in model.infos.values()} - {"F32"})
    for name, info in model.infos.items():
        wide = TensorInfo("F32", info.shape) if is_float(info.dtype) else info
        adopted.add(f"model.{name}", wide, lambda name=name: model.windows(name))  # type: ignore[misc]
    ours = {place.name: name for name, place in gpt2.places.items()}
    for ref in parts.model.values():
        if ref.name in ours:
            name = ours[ref.name]
            adopted.parameters[name] = ref.info.shape, model.infos[name].shape
    if narrow:
        kinds = " and ".join(narrow)
        adopted.notes.append(f"its {kinds} weights became F32, which is what the trainer keeps")
    if gpt2.zeros:
        adopted.notes.append(
            f"{len(gpt2.zeros)} biases that it does not have were added as zeros, which computes the same"
        )
    return _run_config(gpt2.config, parts.config)


def _run_config(shape: GPT2Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's flags, as far as they are known, and the model's shape."""
    config: dict[str, Any] = {"gpt2": shape.to_dict(), "n_head": shape.n_head, "dropout": shape.dropout}
    for name, preset in PRESETS.items():
        same = (preset.n_layer, preset.n_head, preset.n_embd) == (shape.n_layer, shape.n_head, shape.n_embd)
        if same and preset.block_size == shape.block_size:
            config["model"] = name
    rates = {name: float(value) for name, value in given.items() if type(value) in (int, float)}
    counts = {name: int(value) for name, value in rates.items() if value >= 0 and value == int(value)}
    config |= {ours: counts[theirs] for theirs, ours in _COUNTS.items() if theirs in counts}
    config |= {ours: rates[theirs] for theirs, ours in _RATES.items() if theirs in rates}
    if "beta1" in rates and "beta2" in rates:
        config["betas"] = [rates["beta1"], rates["beta2"]]
    if "batch_size" in counts and "gradient_accumulation_steps" in counts:
        config["global_batch"] = counts["batch_size"] * counts["gradient_accumulation_steps"]
    return config


def _add_optimizer(adopted: Adopted, found: Incoming, parts: Recognised) -> dict[str, Any]:
    """Add the optimizer's state; returns its JSON by state key, nothing when there is none to use."""
    if parts.optimizer is None:
        return {}

    def scalar(ref: TensorRef) -> float:
        return float(whole(found.tensors, ref.name).item())

    try:
        result = optimizer_parts(parts.optimizer, adopted.parameters, scalar)
    except StateError as error:
        adopted.notes.append(f"its optimizer was left out: {error}")
        return {}
    for name, tensor in result.tensors.items():
        adopted.add(f"optimizer.state.{name}", tensor.info, _state_reader(found, tensor))
    return {"optimizer": encode(dict(result.document), "optimizer", {})}


def _state_reader(found: Incoming, tensor: StateTensor) -> Windows:
    ref, number = tensor.ref, tensor.number
    if ref is None:
        return lambda: windows_of(torch.tensor(number))
    if tensor.transposed:
        return lambda: transposed_windows(found.tensors, ref.name)
    return _reader(found, ref)


def _resumable(parts: Recognised) -> dict[str, Any]:
    """What our trainer's other objects have to find: the schedule where it was, the data at its beginning."""
    seed = parts.config.get("seed", _SEED)
    return {
        "schedule": {"last_step": parts.step},
        "loader": {
            "epoch": parts.epoch,
            "position": 0,
            "seed": seed if type(seed) is int and 0 <= seed < 2**63 else _SEED,
            "fingerprint": _NO_FINGERPRINT,
        },
    }


def _fresh_generators(adopted: Adopted) -> Any:
    """Random states as `snapshot.rng.capture` gives them, of fresh generators: this process's stay alone."""
    version, words, gauss_next = random.Random(_SEED).getstate()
    kind, keys, position, has_gauss, cached = np.random.RandomState(_SEED).get_state(legacy=True)
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss_next": gauss_next},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "torch": torch.Generator().manual_seed(_SEED).get_state(),
    }
    tensors: dict[str, torch.Tensor] = {}
    document = encode(state, per_rank_name(0, RNG_KEY), tensors)
    for name, tensor in tensors.items():
        info = TensorInfo({torch.int64: "I64", torch.uint8: "U8"}[tensor.dtype], tuple(tensor.shape))
        adopted.add(name, info, lambda tensor=tensor: windows_of(tensor))  # type: ignore[misc]
    return document
