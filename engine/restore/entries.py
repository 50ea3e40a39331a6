"""Entries of the state that are neither module nor optimizer: they are handed what was saved.

Their `load_state_dict` is called, or plain values are replaced in place. Tensors are read into the ones that
they have where those fit, else into new ones. Random number generators come last.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from engine.dcp.boxes import global_shape
from engine.dcp.dtypes import from_torch
from engine.errors import StateError
from engine.format.manifest import Manifest, TensorInfo
from engine.restore.saved import Saved
from engine.snapshot import rng, values
from engine.snapshot.capture import plain_value
from engine.snapshot.captured import RNG_KEY, per_rank_name

log = logging.getLogger(__name__)


class Entries:
    """The wanted entries of one rank, and what the checkpoint has for them. Nothing changes before `finish`.

    Args:
        entries: by state key.
        per_rank: keys whose values belong to a rank.
        takes_rng: whether the random number generators are wanted.
        seed: for the random streams of a rank that did not exist when the checkpoint was taken.
    Attributes:
        differences: by key, one sentence on why an entry cannot take what was saved under its key.
    """

    def __init__(
        self,
        entries: Mapping[str, Any],
        saved: Saved,
        per_rank: frozenset[str],
        *,
        takes_rng: bool,
        seed: int,
    ) -> None:
        self._entries = entries
        self._saved = saved
        self._per_rank = per_rank
        self._takes_rng = takes_rng
        self._seed = seed
        keys = saved.keys
        self._kept = {key: entry for key, entry in entries.items() if key in keys}
        found = {key: self._difference(key, entry) for key, entry in self._kept.items()}
        self.differences = {key: sentence for key, sentence in found.items() if sentence}
        self._will_read()

    def finish(self) -> None:
        """Hand every entry its value, after all tensors were read. Generators come last."""
        for key, entry in self._kept.items():
            if key not in self.differences:
                own = key in self._per_rank
                hand_over(entry, self._per_rank_value(key) if own else self._saved.document(key))
        if self._takes_rng:
            self._finish_rng()

    def _difference(self, key: str, entry: Any) -> str:
        own = key in self._per_rank
        local, shared = self._saved.own, self._saved.manifest.objects
        if key not in local and key not in shared:
            return f"{key}: saved as a module, here a {type(entry).__name__}"
        if key not in (local if own else shared):
            return (
                f"{key}: saved as {'equal on all ranks' if own else 'per rank'}, "
                f"{'declared per_rank' if own else 'not declared per_rank'} here"
            )
        if hasattr(entry, "reshard") and not self._saved.same_world:
            return ""
        return kind_difference(key, entry, (local if own else shared)[key], self._saved.manifest)

    def _will_read(self) -> None:
        saved = self._saved
        for key, entry in self._entries.items():
            if key in self.differences:
                continue
            if key not in self._per_rank:
                self._read_into(entry, saved.manifest.objects.get(key), key)
            elif saved.same_world:
                name = per_rank_name(saved.rank, key)
                self._read_into(entry, saved.locals_[saved.rank].get(key), name)
            else:
                self._require_reshard(key, entry)
        if saved.same_world and self._takes_rng:
            saved.will_read(saved.locals_[saved.rank].get(RNG_KEY), {})

    def _read_into(self, entry: Any, document: Any, path: str) -> None:
        live: dict[str, torch.Tensor] = {}
        if values.tensor_names(document):
            values.encode(plain_value(entry), path, live)
        self._saved.will_read(document, live)

    def _require_reshard(self, key: str, entry: Any) -> None:
        if not hasattr(entry, "reshard"):
            raise StateError(
                f"{key} was saved per rank by {self._saved.manifest.world_size} ranks and cannot be restored "
                f"on {self._saved.world_size}: give its object a method reshard(states, rank, world_size) "
                "that returns the new state of one rank, or resume with the saved world size"
            )
        for local in self._saved.locals_:
            self._saved.will_read(local.get(key), {})

    def _per_rank_value(self, key: str) -> Any:
        saved = self._saved
        if saved.same_world:
            return saved.decoded(saved.locals_[saved.rank][key])
        states = [saved.decoded(local[key]) for local in saved.locals_]
        return self._entries[key].reshard(states, saved.rank, saved.world_size)

    def _finish_rng(self) -> None:
        saved = self._saved
        if saved.same_world:
            document = saved.locals_[saved.rank].get(RNG_KEY)
            if document is not None:  # an imported model brings none: the generators stay as they are
                rng.restore(saved.decoded(document))
            return
        if saved.rank == 0:
            log.info(
                "saved by %d ranks, restored on %d: random streams are derived from (seed %d, step %d, rank)",
                saved.manifest.world_size,
                saved.world_size,
                self._seed,
                saved.manifest.step,
            )
        rng.derive(self._seed, saved.manifest.step, saved.rank)


def kind_difference(key: str, entry: Any, document: Any, manifest: Manifest) -> str:
    """Why `document` cannot fill a plain tensor, list or dict in place, in a sentence; else ""."""
    tensor = document.get("$tensor") if isinstance(document, dict) and len(document) == 1 else None
    info = manifest.tensors.get(tensor) if isinstance(tensor, str) else None
    if isinstance(entry, torch.Tensor):
        here = TensorInfo(from_torch(entry.dtype, key), global_shape(entry))
        if info == here:
            return ""
        was = f"{info.dtype} {list(info.shape)}" if info else "another kind of value"
        return f"{key}: saved as {was}, here {here.dtype} {list(here.shape)}"
    if isinstance(entry, list) and not isinstance(document, list):
        return f"{key}: a list here, saved as another kind of value"
    odd = isinstance(document, dict) and any(form in document for form in ("$tensor", "$float", "$tuple"))
    if isinstance(entry, dict) and (odd or not isinstance(document, dict)):
        return f"{key}: a dict here, saved as another kind of value"
    return ""


def hand_over(entry: Any, value: Any) -> None:
    """Give an object its saved value, in place."""
    if hasattr(entry, "load_state_dict"):
        entry.load_state_dict(value)
    elif isinstance(entry, dict):
        entry.clear()
        entry.update(value)
    elif isinstance(entry, list):
        entry[:] = value
    elif isinstance(entry, torch.Tensor) and entry is not value:
        with torch.no_grad():
            entry.copy_(value)
