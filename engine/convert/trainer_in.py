"""Reads what Hugging Face's Trainer and Accelerate put beside a model's weights: optimizer, step, ...

The layouts follow transformers/trainer.py (_save_checkpoint) and accelerate/checkpointing.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.convert.file_kinds import file_kind
from engine.convert.opened import Joined, Opened
from engine.convert.pt_in import open_pt
from engine.convert.safetensors_in import read_json
from engine.directory.record import VAL_LOSS
from engine.errors import StateError

_TRAINER_STATE = "trainer_state.json"
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_ADAPTER = "adapter_config.json"
_READ = frozenset({"config.json", _TRAINER_STATE, _ADAPTER, "README.md", ".gitattributes"})
_STATE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".safetensors", ".json", ".ckpt")
_DESCRIPTIONS = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "generation_config",
    "chat_template",
    "model.safetensors.index",
    "pytorch_model.bin.index",
    "preprocessor",
    "processor",
    "training_args.json",
)
"""Prefixes of files that hold no training state."""


def add_companions(path: Path, weights: Opened, trust_pickle: bool) -> Opened:
    """The weights in a directory, together with the files beside them; names the files that are not read.

    Raises DamagedError; OSError.
    """
    tree, notes = dict(weights.tree), list(weights.notes)
    sources, left, read = [weights.tensors], list(weights.left_out), {*_weight_files(path, weights), *_READ}
    for name in _OPTIMIZERS:
        if (path / name).exists() and "optimizer" not in tree:
            read.add(name)
            try:
                file = path / name
                found, tensors, said = open_pt(
                    file, trust_pickle=trust_pickle, kind=file_kind(file), prefix=name
                )
            except StateError as error:
                notes.append(f"its optimizer was left out: {error}")
                left.append(name)
                continue
            tree["optimizer"] = found
            sources.append(tensors)
            notes += said
    if (path / _TRAINER_STATE).exists():
        progress, taken = _progress(read_json(path / _TRAINER_STATE))
        tree |= progress
        notes.append(taken)
    if (path / _ADAPTER).exists():
        settings = read_json(path / _ADAPTER)
        base = settings.get("base_model_name_or_path")
        tree["config"] = settings | tree.get("config", {})
        notes.append(f"it is a PEFT adapter, without the weights of its base model ({base})")
    left += [entry.name for entry in sorted(path.iterdir()) if _is_state(entry) and entry.name not in read]
    return dataclasses.replace(
        weights,
        tree=tree,
        tensors=Joined(*sources) if len(sources) > 1 else weights.tensors,
        notes=tuple(notes),
        left_out=tuple(left),
    )


def _weight_files(path: Path, weights: Opened) -> set[str]:
    """The names of the files of the weights: all of a sharded model's, else the first."""
    patterns = {
        "safetensors": ("model.safetensors", "model-*-of-*.safetensors"),
        "pt": (
            "pytorch_model.bin",
            "pytorch_model-*-of-*.bin",
            "pytorch_model_fsdp.bin",
            "adapter_model.bin",
        ),
        "dcp": ("pytorch_model_fsdp_0", "optimizer_0"),
    }[weights.kind]
    found = {file.name for pattern in patterns for file in path.glob(pattern)}
    alone = list(path.glob("*.safetensors"))
    return found or {file.name for file in alone if len(alone) == 1}


def _is_state(entry: Path) -> bool:
    """Whether a file or folder may hold training state; a tokenizer, for example, does not."""
    if entry.name.startswith(_DESCRIPTIONS):
        return False
    return entry.is_dir() or entry.suffix in _STATE_SUFFIXES


def _progress(state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(entries of the tree, a note) from the Trainer's state file."""
    found: dict[str, Any] = {}
    step, epoch = state.get("global_step"), state.get("epoch")
    if type(step) is int:
        found["global_step"] = step
    if isinstance(epoch, int | float) and not isinstance(epoch, bool):
        found["epoch"] = epoch
    history = state.get("log_history")
    for entry in reversed(history if isinstance(history, list) else []):
        if isinstance(entry, dict) and entry.get("step") == step and "eval_loss" in entry:
            found[VAL_LOSS] = entry["eval_loss"]
            break
    names = {"global_step": "step", "epoch": "epoch", VAL_LOSS: "eval_loss"}
    *some, last = [word for key, word in names.items() if key in found] or ["nothing"]
    taken = f"{', '.join(some)} and {last} were" if some else f"{last} was"
    return found, f"from {_TRAINER_STATE}, {taken} taken; its log and its settings were left out"
