"""Entries of the state that are neither modules nor optimizers: they are given what was saved.

Their `load_state_dict` is called, or plain values are replaced in place. Tensors are read into the entry's
own where these fit, else into new ones. Random number generators are restored last.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from engine.errors import HoldfastError, RestoreFailedError, StateError
from engine.format.forms import without_order
from engine.format.manifest import Manifest, TensorInfo
from engine.loaders import make_iterator
from engine.restore import trial
from engine.restore.saved import Saved
from engine.state import rng, values
from engine.state.capture import encoded_entry
from engine.state.captured import RNG_KEY, per_rank_name
from engine.state.entry_kinds import GENERATOR, generator_kind, kind_of, reseed
from engine.state.local_boxes import global_shape
from engine.state.optimizer_kinds import keeps_optimizers
from engine.state.tensor_format import from_torch

log = logging.getLogger(__name__)


class Entries:
    """The selected entries of one rank, and what the checkpoint has for them. No change before `finish`.

    Args:
        entries: by state key.
        per_rank: keys whose values belong to a rank.
        takes_rng: whether to restore the random number generators.
        seed: for the random streams of a rank that did not exist when the checkpoint was saved.
    Attributes:
        differences: by key, one sentence on why an entry cannot accept what was saved under its key.
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
        self._reseeded: set[str] = set()
        self._kept = {key: entry for key, entry in entries.items() if key in keys}
        found = {key: self._difference(key, entry) for key, entry in self._kept.items()}
        self.differences = {key: sentence for key, sentence in found.items() if sentence}
        self._will_read()

    def finish(self) -> None:
        """Give every entry its value, after all tensors were read. Generators come last.

        Raises: RestoreFailedError when an entry does not accept it, with what was restored and what was not.
        """
        # Generators after all other entries: loading those may draw random numbers.
        left = sorted(set(self._kept) - set(self.differences), key=self._is_generator)
        done: list[str] = []
        for key in left:
            try:
                self._finish_one(key, self._kept[key])
            except HoldfastError:
                raise
            except Exception as error:
                raise RestoreFailedError(_broke_off(self._saved.manifest.id, left, done, error)) from error
            done.append(key)
        if self._takes_rng:
            self._finish_rng()

    def _is_generator(self, key: str) -> tuple[bool, int]:
        return bool(generator_kind(self._kept[key])), list(self._kept).index(key)

    def _finish_one(self, key: str, entry: Any) -> None:
        if key in self._reseeded:
            reseed(entry, rng.derived_seed(self._seed, self._saved.manifest.step, self._saved.rank, key))
            return
        value = self._per_rank_value(key) if key in self._per_rank else self._saved.document(key)
        kind = kind_of(entry)
        assert kind is not None, "the state was checked when it was handed over"
        kind.put(entry, value)
        restore_cast_tensors(entry, value)
        make_iterator(entry)

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
        if own and not self._saved.same_world and (hasattr(entry, "reshard") or generator_kind(entry)):
            return ""
        return entry_difference(key, entry, (local if own else shared)[key], self._saved)

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
            elif generator_kind(entry):
                self._reseeded.add(key)
            else:
                self._require_reshard(key, entry)
        if saved.same_world and self._takes_rng:
            saved.will_read(saved.locals_[saved.rank].get(RNG_KEY), {})

    def _read_into(self, entry: Any, document: Any, path: str) -> None:
        live: dict[str, torch.Tensor] = {}
        if values.tensor_names(document):
            encoded_entry(entry, path, live)
        kind = kind_of(entry)
        self._saved.will_read(document, live, keep=kind is not None and kind.holds_values)

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
            if document is not None:  # an imported model has none: the generators keep their state
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


def entry_difference(key: str, entry: Any, document: Any, saved: Saved) -> str:
    """Why an entry cannot accept what was saved, in a sentence; else ""."""
    missing = values.missing_classes(document)
    if missing:
        return f"{key}: {missing[0]}"
    difference = kind_difference(key, entry, document, saved.manifest)
    if difference or not hasattr(entry, "load_state_dict"):
        return difference
    if isinstance(entry, torch.amp.GradScaler) and not entry.is_enabled() and document != {}:
        return f"{key}: saved by an enabled GradScaler, and the one here is disabled and would drop its scale"
    if not values.tensor_names(document):
        words = trial.refusal(entry, saved.decoded(document))
        if words:
            return f"{key}: its load_state_dict does not accept what was saved ({words})"
    return ""


def kind_difference(key: str, entry: Any, document: Any, manifest: Manifest) -> str:
    """Why `document` cannot fill a plain value in place, in a sentence; else ""."""
    if hasattr(entry, "load_state_dict"):
        return ""
    form, inner = _form_of(document)
    if isinstance(entry, torch.Tensor):
        info = manifest.tensors.get(inner) if form == "$tensor" and isinstance(inner, str) else None
        here = TensorInfo(from_torch(entry.dtype, key), global_shape(entry))
        if info == here:
            return ""
        was = f"{info.dtype} {list(info.shape)}" if info else "another kind of value"
        return f"{key}: saved as {was}, here {here.dtype} {list(here.shape)}"
    if isinstance(entry, np.ndarray):
        if not entry.flags.writeable:
            return f"{key}: a read-only array here, which cannot be filled in place"
        array = f"{entry.dtype.str} {list(entry.shape)}"
        was = f"{inner['dtype']} {inner['shape']}" if form == "$array" else "another kind of value"
        return "" if was == array else f"{key}: saved as {was}, here {array}"
    generator = generator_kind(entry)
    if generator:
        plain = without_order(document)
        kind = plain.get(GENERATOR) if isinstance(plain, dict) else None
        was = kind if isinstance(kind, str) else "another kind of value"
        return "" if was == generator else f"{key}: saved as {was}, here a {generator}"
    fits = any(isinstance(entry, kind) and test(form, document) for kind, test in _CONTAINERS.items())
    return "" if fits else f"{key}: a {type(entry).__name__} here, saved as another kind of value"


def _form_of(document: Any) -> tuple[str, Any]:
    """The `$` form of a document and its content; ("", None) for plain JSON."""
    if isinstance(document, dict) and len(document) == 1:
        ((form, inner),) = document.items()
        if form.startswith("$"):
            return form, inner
    return "", None


def _is_dict(form: str, document: Any) -> bool:
    return isinstance(document, dict) and form in ("", "$items", "$mapping", "$counter")


_CONTAINERS: Mapping[type, Callable[[str, Any], bool]] = {
    dict: _is_dict,
    list: lambda form, document: isinstance(document, list),
    collections.deque: lambda form, document: isinstance(document, list),
    set: lambda form, document: form == "$set",
    bytearray: lambda form, document: form == "$bytes",
}


def _broke_off(id: str, keys: Sequence[str], done: Sequence[str], error: Exception) -> str:
    failed, *rest = keys[len(done) :]
    restored = ", ".join(["all tensors of modules and optimizers", *done])
    lost = ", ".join([failed, *rest, "the random number generators"])
    return (
        f"the restore of {id} stopped halfway, and the state is now undefined: {failed} did not accept what "
        f"was saved ({type(error).__name__}: {error}). Restored: {restored}. Not restored: {lost}. "
        f"Leave {failed} out with exclude=({failed!r},), or build it as it was when it was saved"
    )


def restore_cast_tensors(entry: Any, saved: Any) -> None:
    """Replace state tensors that torch has cast, in optimizers inside an object, by the saved ones.

    A list of optimizers behind one state_dict() is an entry like any other. Its load_state_dict() calls
    torch's, which casts moments to the dtype of their parameters.
    """
    if keeps_optimizers(entry):
        _walk(saved, entry.state_dict(), inside=False)


def _walk(saved: Any, live: Any, *, inside: bool) -> None:
    """inside: below the state dict of an optimizer, which holds the live state and not a copy."""
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        inside = inside or {"state", "param_groups"} <= saved.keys()
        for key, value in saved.items():
            now = live.get(key)
            if inside and isinstance(live, dict) and isinstance(now, torch.Tensor) and _was_cast(value, now):
                live[key] = value.to(now.device)
            else:
                _walk(value, now, inside=inside)
    elif isinstance(saved, list | tuple) and isinstance(live, list | tuple) and len(saved) == len(live):
        for value, now in zip(saved, live, strict=True):
            _walk(value, now, inside=inside)


def _was_cast(saved: Any, live: torch.Tensor) -> bool:
    if not isinstance(saved, torch.Tensor):
        return False
    return saved.dtype != live.dtype and saved.shape == live.shape and not isinstance(live, DTensor)
