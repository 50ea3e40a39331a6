"""Loads a GPT-2 into memory, from a checkpoint or from an exported file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.incoming import Incoming, incoming
from engine.convert.recognise import recognise, tensors_by_name
from engine.convert.tensors import fill, whole
from engine.errors import ConfigError, StateError
from engine.format.names import MANIFEST
from engine.gpt2.hf_export import gpt2_of
from engine.gpt2.tensors import Gpt2Tensors, find_gpt2
from engine.restore.choice import choose_checkpoint
from engine.storage.open import open_storage
from engine.storage.redact import redact_uri
from engine.storage.uris import split_uri
from model.config import GPT2Config
from model.gpt2 import GPT2


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its weights; `what` and `described` tell the user where they came from."""

    model: GPT2
    what: str
    described: str

    @property
    def config(self) -> GPT2Config:
        """The model's shape."""
        return self.model.config


def load_model(
    selector: str, directory: str, device: str = "auto", options: Mapping[str, str] | None = None
) -> Loaded:
    """Load the GPT-2 that `selector` names: a checkpoint in `directory`, or an exported model.

    Raises: SelectorError; StateError if it is not a GPT-2; DamagedError; ConfigError for a missing device;
        StorageError.
    """
    where = _device(device)
    if _is_exported(selector, options):
        with incoming(selector, options=options) as found:
            return Loaded(_fill(_exported(found), where), found.what, f"an export ({found.kind})")
    choice = choose_checkpoint(open_storage(directory, options), selector, options=options)
    if choice is None:
        raise ConfigError(
            f"{redact_uri(directory)} holds no checkpoint: give another --checkpoint_dir, or give --from the "
            "path of a checkpoint or of an exported model"
        )
    storage = open_storage(choice.target or directory, options)
    name = os.path.basename(choice.record.path.rstrip("/"))
    with CheckpointTensors(storage, name) as source:
        tensors = Gpt2Tensors(source, gpt2_of(source))
        tensors.check_tied(source.uri)
        return Loaded(_fill(tensors, where), source.uri, f"step {choice.record.step}")


def _is_exported(selector: str, options: Mapping[str, str] | None) -> bool:
    """Whether it is the address of something other than a Holdfast checkpoint."""
    if "/" not in selector and not os.path.exists(selector):
        return False
    parent, name = split_uri(selector)
    storage = open_storage(parent, options)
    return storage.exists(name) and not storage.exists(f"{name}/{MANIFEST}")


def _exported(found: Incoming) -> Gpt2Tensors:
    parts = recognise(found.tree, found.what, lambda ref: whole(found.tensors, ref.name).item())
    model, config = parts.model, parts.config
    if parts.marker is not None:
        key = "model" if "model" in parts.marker["modules"] else next(iter(parts.marker["modules"]), None)
        if key is None:
            raise StateError(f"{found.what} holds no model")
        model = tensors_by_name(parts.tree[key], found.what)[0]
    names = {name: ref.name for name, ref in model.items()}
    tensors = Gpt2Tensors(found.tensors, find_gpt2(found.tensors, names, config, found.what))
    tensors.check_tied(found.what)
    return tensors


def _fill(tensors: Gpt2Tensors, device: torch.device) -> GPT2:
    with torch.device("meta"):
        model = GPT2(tensors.found.config)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(parameter, tensors.windows(name))
    return model


def _device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("--device cuda, but torch finds no CUDA device; give --device cpu")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")
