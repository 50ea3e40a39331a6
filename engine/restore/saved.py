"""One checkpoint as one rank sees it: its documents, and the tensors inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.errors import DamagedError
from engine.format.manifest import Manifest, TensorInfo
from engine.state import values
from engine.state.captured import OwnNames, per_rank_name
from engine.state.local_boxes import detached, global_shape
from engine.state.sharing import union_of_values
from engine.state.tensor_format import to_torch


class Saved:
    """The saved values of a checkpoint, and memory to read the tensors inside them into.

    Args:
        manifest: the checkpoint's.
        locals_: each saved rank's rank-local JSON.
        rank, world_size: of the run that restores.
        names: the names of what is declared per rank; `manifest` has them as live names.
    Attributes:
        tensors: the memory to read values' tensors into, by saved name.
    """

    def __init__(
        self,
        manifest: Manifest,
        locals_: Sequence[Mapping[str, Any]],
        rank: int,
        world_size: int,
        names: OwnNames | None = None,
    ) -> None:
        self.manifest = manifest
        self.locals_ = locals_
        self.rank = rank
        self.world_size = world_size
        self.same_world = manifest.world_size == world_size
        self.tensors: dict[str, torch.Tensor] = {}
        self._names = names or OwnNames(rank, frozenset())
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def own(self) -> Mapping[str, Any]:
        """This rank's own saved values; those of rank 0 if the world size was another."""
        return self.locals_[self.rank if self.same_world else 0] if self.locals_ else {}

    @property
    def value_keys(self) -> set[str]:
        """Every state key that has a document."""
        return {*self.manifest.objects, *self.own}

    @property
    def keys(self) -> set[str]:
        """Every state key of the checkpoint."""
        names = (*self.manifest.tensors, *self.manifest.aliases)
        return self.value_keys | {name.partition(".")[0] for name in names}

    def json(self, key: str) -> Any:
        """The document under a state key that is not declared per rank; None if it has none.

        A rank's own values of a module's extra state come first: submodule name -> value.
        """
        shared = self.manifest.objects.get(key)
        if key in self._names.keys:
            return shared
        own = self.own.get(key) if self.same_world else None
        return shared if shared is None or own is None else union_of_values([own, shared])

    def info(self, name: str) -> TensorInfo:
        """Dtype and global shape of a tensor that a document refers to."""
        info = self.manifest.tensors.get(name)
        if info is None:
            raise DamagedError(f"{self.manifest.id} refers to the tensor {name}, which it does not list")
        return info

    def blank(self, name: str) -> torch.Tensor:
        """A tensor of that dtype and shape with arbitrary values, to decode a document before it is read."""
        info = self.info(name)
        return torch.empty(info.shape, dtype=to_torch(info.dtype))

    def own_name(self, name: str) -> str:
        """The saved name of this rank's own value of a tensor; `name` if it has none.

        Ranks have own values of a module's buffers (the running statistics of a batch norm).
        """
        if self._names.of(name) != name:
            return self._names.of(name)
        own = per_rank_name(self.rank, name)
        kept = self.same_world and self.manifest.tensors.get(own) == self.manifest.tensors.get(name)
        return own if kept else name

    def will_read(self, document: Any, live: Mapping[str, torch.Tensor], *, keep: bool = False) -> None:
        """Register the tensors inside a document to be read: into the live ones of that name if these fit.

        keep: `decoded` returns those live tensors themselves, for a container that holds them.
        """
        for name in values.tensor_names(document):
            info = self.info(name)
            own = live.get(name)
            if own is not None and global_shape(own) == info.shape and own.dtype == to_torch(info.dtype):
                self.tensors[name] = detached(own)
                if keep:
                    self._kept[name] = own
            else:
                device = torch.device("cpu") if own is None else own.device
                self.tensors[name] = torch.empty(info.shape, dtype=to_torch(info.dtype), device=device)

    def document(self, key: str) -> Any:
        """The value under a state key that is not declared per rank; its tensors must have been read."""
        return self.decoded(self.json(key))

    def decoded(self, document: Any) -> Any:
        """A document's value; its tensors must have been read."""
        return values.decode(document, self._tensor)

    def _tensor(self, name: str) -> torch.Tensor:
        found = self._kept.get(name, self.tensors.get(name))
        if found is None:
            raise DamagedError(f"{self.manifest.id} refers to the tensor {name}, which was not read")
        return found
