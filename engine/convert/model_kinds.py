"""The interface for kinds of models that conversions treat specially, such as our GPT-2.

The library converts any model tensor by tensor. A `ModelKind` does more: it maps another tool's names and
layout to its own, and writes Hugging Face's files. Kinds are passed to `import_checkpoint`
and `export_checkpoint`; `engine.checkpoints.convert_commands` finds those that are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.checkpoint_parts import contents_of, main_module
from engine.convert.numbering import Parameter
from engine.convert.recognise import Recognised
from engine.convert.tensors import Progress, TensorSource
from engine.errors import ConfigError, StateError
from engine.format.manifest import TensorInfo

Windows = Callable[[], Iterator[torch.Tensor]]
AddTensor = Callable[[str, TensorInfo, Windows], None]
"""Adds a tensor to a checkpoint under its full name there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedModel:
    """A foreign model under its kind's names and in its layout.

    infos, windows: the tensors to commit, by name in the module.
    parameters: in the module's order, for an optimizer that only numbers them.
    state_dtype: the new type of an optimizer's floating-point state; None keeps it.
    config: the configuration to store with the checkpoint.
    notes: what was converted.
    """

    infos: Mapping[str, TensorInfo]
    windows: Callable[[str], Iterator[torch.Tensor]]
    parameters: Mapping[str, Parameter]
    state_dtype: str | None
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumable:
    """JSON values that the kind's trainer needs besides model and optimizer.

    objects: shared, by state key. local: rank 0's. notes: what they are, in sentences.
    """

    objects: Mapping[str, Any] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class ModelKind(Protocol):
    """One kind of model."""

    @property
    def name(self) -> str:
        """Its name in messages, without an article: "GPT-2"."""
        ...

    def recognises(self, names: Collection[str], config: Mapping[str, Any]) -> bool:
        """Whether these tensor names and this configuration belong to such a model."""
        ...

    def convert(self, tensors: TensorSource, parts: Recognised, what: str) -> ConvertedModel:
        """Convert a foreign model; `what` names it in errors.

        StateError if it is incomplete, or its settings describe a computation that the kind does not support.
        """
        ...

    def resumable(self, parts: Recognised, step: int, add: AddTensor) -> Resumable:
        """The values that its trainer needs to resume an import that has an optimizer.

        Their tensors are passed to `add`.
        """
        ...

    def hf_bytes(self, source: CheckpointTensors, dtype: str | None) -> int:
        """How many tensor bytes `write_hf` will write. StateError if the model is incomplete."""
        ...

    def write_hf(
        self,
        source: CheckpointTensors,
        folder: Path,
        *,
        dtype: str | None,
        shard_bytes: int,
        progress: Progress,
    ) -> None:
        """Write the model, for `from_pretrained`, into the new directory `folder`.

        Raises: StateError; DamagedError; ConfigError; StorageError.
        """
        ...


def find_kind(
    kinds: Sequence[ModelKind], names: Collection[str], config: Mapping[str, Any]
) -> ModelKind | None:
    """The first kind that recognises the model."""
    return next((kind for kind in kinds if kind.recognises(names, config)), None)


def exporting_kind(source: CheckpointTensors, kinds: Sequence[ModelKind]) -> ModelKind:
    """The kind of a checkpoint's model. ConfigError if no kind is installed, StateError if none matches."""
    if not kinds:
        raise ConfigError(
            "--format hf needs a model kind that writes Hugging Face's files, and none is installed: the "
            "GPT-2 example (engine.gpt2) has one; --format torch and --format dcp export any model"
        )
    contents = contents_of(source.manifest)
    names = contents.modules[main_module(contents, source.uri)]
    kind = find_kind(kinds, names, source.manifest.config)
    if kind is None:
        raise StateError(
            f"the model of {source.uri} is not a {names_of(kinds)}, so --format hf cannot write it: use "
            "--format torch or --format dcp"
        )
    return kind


def names_of(kinds: Sequence[ModelKind]) -> str:
    """The kinds' names for a message: "GPT-2 or Llama"."""
    return " or ".join(kind.name for kind in kinds)
