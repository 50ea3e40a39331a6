"""An opened foreign checkpoint of any format, and several tensor sources as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from engine.convert.tensors import TensorSource
from engine.format.manifest import TensorInfo

Kind = Literal["safetensors", "dcp", "pt"]


@dataclass(frozen=True, slots=True)
class Opened:
    """In `tree`, tensors are `TensorRef`s with their names in `tensors`.

    kind: the format of the model's weights. notes: for the user, in sentences.
    left_out: files that were not read, by name.
    """

    kind: Kind
    tree: Mapping[str, Any]
    tensors: TensorSource
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = field(default=())


class Joined:
    """The tensors of several sources with distinct names."""

    def __init__(self, *sources: TensorSource) -> None:
        self._homes = {name: source for source in sources for name in source.infos}
        self._infos = {name: info for source in sources for name, info in source.infos.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def windows(self, name: str) -> Iterator[torch.Tensor]:
        """See `TensorSource`."""
        return self._homes[name].windows(name)
