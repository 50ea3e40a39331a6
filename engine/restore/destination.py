"""Where a checkpoint goes: the live tensors that are filled in place, and the objects that are handed JSON.

Modules and optimizers are filled in place, tensor by tensor. Other objects get their `load_state_dict`
called with what was saved; their tensors are read into the ones they have where those fit, else into new
ones. Random number generators come last.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.dcp.boxes import detached, global_shape
from engine.dcp.dtypes import from_torch, to_torch
from engine.errors import DamagedError, StateError, StateMismatchError
from engine.format.manifest import Manifest, TensorInfo
from engine.restore import optimizer as optimizers
from engine.restore.fit import Fit, match, report, summary
from engine.restore.wanted import Wanted
from engine.snapshot import rng, values
from engine.snapshot.capture import StateCapture, plain_value
from engine.snapshot.captured import PER_RANK_PREFIX, RNG_KEY, per_rank_name
from engine.snapshot.modules import EXTRA_STATE, canonical
from engine.snapshot.optimizers import OptimizerCapture

log = logging.getLogger(__name__)


class Destination:
    """The live state of one rank, made ready to receive one checkpoint. Nothing is changed before `finish`.

    Args:
        capture: the state.
        manifest: the checkpoint's.
        locals_: each saved rank's rank-local JSON.
        seed: for the random streams of a rank that did not exist when the checkpoint was taken.
        wanted: the part of it to restore, and whether it has to fit exactly.
    Attributes:
        tensors: what to read, by a name of the destination; of the saved dtype and global shape, or of one
            with more rows.
        sources: the saved name of each.
        fit: how the checkpoint's tensors match the state's.
    """

    def __init__(
        self,
        capture: StateCapture,
        manifest: Manifest,
        locals_: Sequence[Mapping[str, Any]],
        *,
        rank: int,
        world_size: int,
        seed: int,
        wanted: Wanted,
    ) -> None:
        self._capture = capture
        self._manifest = manifest
        self._locals = locals_
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._same_world = manifest.world_size == world_size
        self._without_state: dict[str, set[str]] = {}
        self._extra: dict[str, torch.Tensor] = {}
        self._made_state: list[Optimizer] = []
        self._wanted = wanted
        keys = [key for key in capture.state if wanted.takes_key(key)]
        self._keys = [
            key for key in keys if not wanted.model_only or isinstance(capture.state[key], nn.Module)
        ]
        try:
            self._prepare_optimizers()
            live, live_aliases = self._live()
            self.fit = self._match(live, live_aliases)
            self._unfit = self._value_differences(self._saved_keys())
            self._add_values()
        except Exception:
            self.abandon()
            raise
        self.sources = dict(self.fit.matched)
        if not wanted.strict:
            self.sources |= self.fit.grown
        self.tensors = {name: live[name] for name in self.sources} | self._extra
        self.sources |= {name: name for name in self._extra}

    def check(self, what: str) -> None:
        """Raise StateMismatchError with every difference, if it has to fit; nothing has been changed yet."""
        lines = list(self.fit.mismatched)
        missing = list(self.fit.missing)
        for key, capture in self._optimizers():
            if key in self._manifest.objects:
                lines += optimizers.group_differences(capture, self._document(key))
        saved = self._saved_keys()
        missing += [f"{key} (all of it)" for key in self._keys if key not in saved]
        lines += self._unfit.values()
        unexpected = (*self.fit.unexpected, *self._unknown_keys())
        fit = Fit(self.fit.matched, tuple(missing), unexpected, tuple(lines), self.fit.grown)
        if self._wanted.strict and not fit.exact:
            raise StateMismatchError(report(fit, what))
        if not fit.exact and self._rank == 0:
            log.warning("%s", summary(fit, what))

    def abandon(self) -> None:
        """Nothing will be read: leave optimizers without the state that was made to read into."""
        for optimizer in self._made_state:
            optimizer.state.clear()

    def finish(self) -> None:
        """Hand every object its values, after all tensors were read. Generators come last."""
        for key in self._keys:
            entry = self._capture.state[key]
            if isinstance(entry, nn.Module) and key in self._manifest.objects:
                _set_extra_state(entry, self._document(key))
        for key, capture in self._optimizers():
            if key in self._manifest.objects:
                optimizers.drop_state(capture, self._without_state[key])
                optimizers.apply_groups(capture, self._document(key))
        saved = self._saved_keys()
        for key, entry in self._others():
            if key not in saved or key in self._unfit:
                continue
            if key in self._capture.per_rank:
                _hand_over(entry, self._per_rank_value(key))
            else:
                _hand_over(entry, self._document(key))
        if self._takes_rng():
            self._finish_rng()

    def _optimizers(self) -> list[tuple[str, OptimizerCapture]]:
        return [(key, capture) for key, capture in self._capture.optimizers.items() if key in self._keys]

    def _others(self) -> list[tuple[str, Any]]:
        """The wanted entries that are neither module nor optimizer."""
        entries = [(key, self._capture.state[key]) for key in self._keys]
        return [(key, entry) for key, entry in entries if not isinstance(entry, nn.Module | Optimizer)]

    def _takes_rng(self) -> bool:
        return not self._wanted.model_only and self._wanted.takes_key(RNG_KEY)

    def _own_values(self) -> Mapping[str, Any]:
        """The saved values of this very rank, or of rank 0 where the world was another."""
        return self._locals[self._rank if self._same_world else 0] if self._locals else {}

    def _saved_keys(self) -> set[str]:
        """Every state key that the checkpoint has something for."""
        saved = {*self._manifest.objects, *self._own_values()}
        return saved | {n.partition(".")[0] for n in (*self._manifest.tensors, *self._manifest.aliases)}

    def _unknown_keys(self) -> list[str]:
        """Keys of saved values that the state lacks and of which no tensor tells."""
        if self._wanted.model_only:
            return []
        saved = {*self._manifest.objects, *self._own_values()}
        told = {name.partition(".")[0] for name in self.fit.unexpected}
        known = {*self._capture.state, RNG_KEY, PER_RANK_PREFIX, *told}
        return [f"{key} (all of it)" for key in sorted(saved - known) if self._wanted.takes_key(key)]

    def _value_differences(self, saved: set[str]) -> dict[str, str]:
        """One sentence for each plain entry that cannot take what was saved under its key."""
        lines: dict[str, str] = {}
        for key, entry in self._others():
            if key not in saved:
                continue
            own = key in self._capture.per_rank
            local, shared = self._own_values(), self._manifest.objects
            if key not in local and key not in shared:
                lines[key] = f"{key}: saved as a module, here a {type(entry).__name__}"
            elif key not in (local if own else shared):
                lines[key] = (
                    f"{key}: saved as {'equal on all ranks' if own else 'per rank'}, "
                    f"{'declared per_rank' if own else 'not declared per_rank'} here"
                )
            elif not hasattr(entry, "reshard") or self._same_world:
                document = (local if own else shared)[key]
                difference = _kind_difference(key, entry, document, self._manifest)
                if difference:
                    lines[key] = difference
        return lines

    def _prepare_optimizers(self) -> None:
        self._capture.make_ready()
        saved = {*self._manifest.tensors, *self._manifest.aliases}
        for key, capture in self._optimizers():
            absent = self._without_state[key] = optimizers.parameters_without_state(
                capture, saved, self._manifest.objects.get(key) or {}
            )
            if any(name not in absent for names in capture.group_names() for name in names):
                module = self._capture.state[capture.owner]
                if optimizers.ensure_state(module, capture.optimizer):
                    self._made_state.append(capture.optimizer)
        if self._made_state:
            self._capture.refresh()

    def _live(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        tensors, aliases = self._capture.fixed_tensors()
        kept = {name: tensor for name, tensor in tensors.items() if self._takes(name)}
        aliases = {alias: name for alias, name in aliases.items() if name in kept}
        for key, absent in self._without_state.items():
            prefix = f"{key}.state."
            for name in list(kept):
                if name.startswith(prefix) and name.removeprefix(prefix).rpartition(".")[0] in absent:
                    del kept[name]
        return kept, aliases

    def _takes(self, name: str) -> bool:
        """Whether a tensor of a module or optimizer is wanted, live or saved."""
        if self._wanted.model_only and name.partition(".")[0] not in self._capture.modules:
            return False
        return self._wanted.takes(name)

    def _match(self, live: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> Fit:
        infos = {name: TensorInfo(from_torch(t.dtype, name), global_shape(t)) for name, t in live.items()}
        fixed = {*self._capture.modules, *self._capture.optimizers}
        # A key that the state lacks altogether is unexpected; a generic object's tensors match themselves.
        generic = {PER_RANK_PREFIX, *(key for key in self._capture.state if key not in fixed)}
        # Tensors inside values (a learning rate that is one) are read for those values.
        inside = {name for key in fixed for name in values.tensor_names(self._manifest.objects.get(key))}
        saved = {
            name: info
            for name, info in self._manifest.tensors.items()
            if name not in inside and name.partition(".")[0] not in generic and self._takes(name)
        }
        return match(infos, aliases, saved, self._manifest.aliases)

    def _add_values(self) -> None:
        """Tensors inside of values: extra state, hyperparameters, other objects, this rank's own."""
        for key in self._keys:
            if isinstance(self._capture.state[key], nn.Module | Optimizer):
                self._add_tensors(self._manifest.objects.get(key), None, key)
        for key, entry in self._others():
            if key in self._unfit:
                continue
            if key in self._capture.per_rank:
                if self._same_world:
                    name = per_rank_name(self._rank, key)
                    self._add_tensors(self._locals[self._rank].get(key), entry, name)
                else:
                    self._require_reshard(key, entry)
            else:
                self._add_tensors(self._manifest.objects.get(key), entry, key)
        if self._same_world and self._takes_rng():
            self._add_tensors(self._locals[self._rank].get(RNG_KEY), None, "")

    def _require_reshard(self, key: str, entry: Any) -> None:
        if not hasattr(entry, "reshard"):
            raise StateError(
                f"{key} was saved per rank by {self._manifest.world_size} ranks and cannot be restored on "
                f"{self._world_size}: give its object a method reshard(states, rank, world_size) that "
                "returns the new state of one rank, or resume with the saved world size"
            )
        for local in self._locals:
            self._add_tensors(local.get(key), None, "")

    def _add_tensors(self, document: Any, entry: Any, path: str) -> None:
        names = values.tensor_names(document)
        if not names:
            return
        live: dict[str, torch.Tensor] = {}
        if entry is not None:
            values.encode(plain_value(entry), path, live)
        for name in names:
            info = self._manifest.tensors.get(name)
            if info is None:
                raise DamagedError(f"{self._manifest.id} refers to the tensor {name}, which it does not list")
            own = live.get(name)
            if own is not None and global_shape(own) == info.shape and own.dtype == to_torch(info.dtype):
                self._extra[name] = detached(own)
            else:
                self._extra[name] = torch.empty(info.shape, dtype=to_torch(info.dtype))

    def _document(self, key: str) -> Any:
        return values.decode(self._manifest.objects[key], self._tensor)

    def _tensor(self, name: str) -> torch.Tensor:
        found = self._extra.get(name)
        if found is None:
            raise DamagedError(f"{self._manifest.id} refers to the tensor {name}, which was not read")
        return found

    def _per_rank_value(self, key: str) -> Any:
        if self._same_world:
            return values.decode(self._locals[self._rank][key], self._tensor)
        states = [values.decode(local[key], self._tensor) for local in self._locals]
        return self._capture.state[key].reshard(states, self._rank, self._world_size)

    def _finish_rng(self) -> None:
        if self._same_world:
            saved = self._locals[self._rank].get(RNG_KEY)
            if saved is not None:  # an imported model brings none: the generators stay as they are
                rng.restore(values.decode(saved, self._tensor))
            return
        if self._rank == 0:
            log.info(
                "saved by %d ranks, restored on %d: random streams are derived from (seed %d, step %d, rank)",
                self._manifest.world_size,
                self._world_size,
                self._seed,
                self._manifest.step,
            )
        rng.derive(self._seed, self._manifest.step, self._rank)


def _kind_difference(key: str, entry: Any, document: Any, manifest: Manifest) -> str:
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


def _set_extra_state(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give submodules what their get_extra_state() returned, under canonical names."""
    for name, child in module.named_modules():
        prefix = canonical(module, name) if name else ""
        key = f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE
        # A wrapper (DDP, torch.compile) has the canonical name of what it wraps.
        has_some = type(child).get_extra_state is not nn.Module.get_extra_state
        if has_some and key in saved:
            child.set_extra_state(saved[key])


def _hand_over(entry: Any, value: Any) -> None:
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
