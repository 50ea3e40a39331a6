"""Where a checkpoint is restored to: live tensors that are filled in place, and objects that get values.

Each kind of entry has its own module: `modules`, `optimizers`, `entries`. This one puts them together.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.errors import StateMismatchError
from engine.format.manifest import Manifest, TensorInfo
from engine.restore.bounce_buffers import BounceBuffers
from engine.restore.entries import Entries
from engine.restore.filters import Filter
from engine.restore.matching import Match, match_tensors, report, summary
from engine.restore.modules import Modules
from engine.restore.optimizers import Optimizers
from engine.restore.rename import own_view, rename_checkpoint
from engine.restore.saved import Saved
from engine.state import values
from engine.state.capture import StateCapture
from engine.state.captured import PER_RANK_PREFIX, RNG_KEY, OwnNames
from engine.state.local_boxes import global_shape
from engine.state.tensor_format import from_torch

log = logging.getLogger(__name__)


class Destination:
    """The live state of one rank, prepared for one checkpoint. No value is changed before `finish`.

    Args:
        capture: the state.
        manifest: the checkpoint's.
        locals_: each saved rank's rank-local JSON.
        seed: for the random streams of a rank that did not exist when the checkpoint was saved.
        filter: the part of it to restore, and whether it has to match exactly.
    Attributes:
        tensors: what to read into, by a name of the destination. Each has the saved dtype and global shape,
            or more rows.
        sources: the saved name of each.
        match: how the checkpoint's tensors match the state's.
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
        filter: Filter,
    ) -> None:
        self._capture = capture
        self._rank = rank
        self._filter = filter
        keys = [key for key in capture.state if filter.takes_key(key)]
        self._keys = [
            key for key in keys if not filter.model_only or isinstance(capture.state[key], nn.Module)
        ]
        renamed = rename_checkpoint(manifest, locals_, filter.rename)
        manifest, locals_ = renamed.manifest, renamed.locals_
        own = capture.names.keys & set(self._keys)
        manifest = own_view(manifest, locals_, own, rank=rank, world_size=world_size)
        self._manifest = manifest
        self._saved = Saved(manifest, locals_, rank, world_size, OwnNames(rank, own))
        capture.make_ready()
        self._modules = Modules(capture, self._keys, self._saved, filter)
        try:
            self._modules.prepare()
            self._optimizers = Optimizers(capture, self._saved, filter)
            live, live_aliases = self._live()
            self.match = self._match(live, live_aliases).with_more(self._optimizers.match)
            self._modules.will_read(live)
            self._entries = Entries(
                self._others(),
                self._saved,
                capture.per_rank,
                takes_rng=not filter.model_only and filter.takes_key(RNG_KEY),
                seed=seed,
            )
        except Exception:
            self.abandon()
            raise
        self.sources = dict(self.match.matched)
        if not filter.strict:
            self.sources |= self.match.grown
        live |= self._optimizers.tensors
        self._bounce_buffers = BounceBuffers(
            {name: live[name] for name in self.sources} | self._saved.tensors
        )
        self.tensors = self._bounce_buffers.tensors
        self.sources |= {name: name for name in self._saved.tensors}
        stored = {name: self._saved.own_name(saved) for name, saved in self.sources.items()}
        self.sources = {name: renamed.stored.get(saved, saved) for name, saved in stored.items()}

    @property
    def unexpected(self) -> tuple[str, ...]:
        """The names of tensors and the state keys that the checkpoint has and this rank does not."""
        return (*self.match.unexpected, *self._modules.unexpected, *self._unknown_keys())

    def check(self, what: str, unexpected: Collection[str] | None = None) -> None:
        """Raise StateMismatchError with every difference if it has to match; nothing was changed so far.

        `unexpected`: the names that no rank has a place for; None: those that this one has no place for.
        """
        self._check_patterns(what)
        saved = self._saved.keys
        absent = [key for key in self._keys if key not in saved and not self._modules.is_empty(key)]
        missing = (*self.match.missing, *self._modules.missing, *(f"{key} (all of it)" for key in absent))
        lines = (
            *self.match.mismatched,
            *self._modules.differences,
            *self._entries.differences.values(),
            *self._missing_classes(),
        )
        nowhere = tuple(name for name in self.unexpected if unexpected is None or name in unexpected)
        match = Match(self.match.matched, missing, nowhere, lines, self.match.grown)
        if self._filter.strict and not match.exact:
            raise StateMismatchError(report(match, what))
        if not match.exact and self._rank == 0:
            log.warning("%s", summary(match, what))

    def abandon(self) -> None:
        """Nothing will be read: remove the tensors that were made to read into."""
        self._modules.abandon()

    def finish(self) -> None:
        """Hand every object its values, after all tensors were read. Generators come last."""
        self._bounce_buffers.finish()
        self._modules.finish()
        self._optimizers.finish()
        self._entries.finish()

    def _check_patterns(self, what: str) -> None:
        """Refuse patterns that match nothing: they would restore nothing and report success."""
        live, aliases = self._capture.fixed_tensors()
        stored = {*self._manifest.tensors, *self._manifest.aliases}
        documents = self._manifest.objects
        modules = {key for key in documents if key in self._capture.modules}
        values = {f"{key}.{name}" for key in modules for name in documents[key]}
        fixed = {name.partition(".")[0] for name in (*live, *stored)} - {PER_RANK_PREFIX}
        others = {key for key in {*documents, *self._capture.state} if key not in self._capture.modules}
        names = [n for n in (*live, *aliases, *stored, *values) if n.partition(".")[0] not in others]
        keys = {*fixed, *self._capture.state, *self._saved.keys, RNG_KEY}
        entries = [key for key, kind in self._capture.kinds(self._capture.state).items() if kind == "value"]
        parts = self._filter.inside([RNG_KEY, *entries])
        if parts:
            raise StateMismatchError(
                f"include or exclude names {', '.join(map(repr, parts))}, but the value of a state key "
                f"is restored as a whole: name {parts[0].partition('.')[0]!r}, or keep the part and put it "
                "back afterwards; nothing was changed"
            )
        # Patterns without a state key ("*.exp_avg") may mean state of optimizers.
        moments = [name for name in (*live, *stored) if name.partition(".")[0] in self._capture.optimizers]

        def nowhere(*, excluded: bool) -> list[str]:
            found = self._filter.unknown(names, keys, excluded=excluded)
            return [pattern for pattern in found if not any(fnmatchcase(name, pattern) for name in moments)]

        stray = nowhere(excluded=True)
        if stray and self._rank == 0:  # no error: one list may serve for many checkpoints
            log.warning("exclude names %s, which neither %s nor the state has", ", ".join(stray), what)
        unknown = nowhere(excluded=False)
        if unknown and self._filter.strict:
            raise StateMismatchError(
                f"include names {', '.join(map(repr, unknown))}, which neither {what} nor the state has; "
                "nothing was changed"
            )

    def _missing_classes(self) -> list[str]:
        """One sentence for each value of a module or optimizer whose class this program lacks."""
        fixed = [key for key in self._keys if isinstance(self._capture.state[key], nn.Module | Optimizer)]
        documents = {key: self._saved.json(key) for key in fixed}
        return [f"{key}: {line}" for key in fixed for line in values.missing_classes(documents[key])]

    def _others(self) -> dict[str, Any]:
        """The selected entries that are neither modules nor optimizers."""
        entries = {key: self._capture.state[key] for key in self._keys}
        return {key: entry for key, entry in entries.items() if not isinstance(entry, nn.Module | Optimizer)}

    def _unknown_keys(self) -> list[str]:
        """The keys of saved values that the state lacks and that no unexpected tensor is below."""
        if self._filter.model_only:
            return []
        told = {name.partition(".")[0] for name in self.match.unexpected}
        known = {*self._capture.state, RNG_KEY, PER_RANK_PREFIX, *told}
        unknown = sorted(self._saved.value_keys - known)
        return [f"{key} (all of it)" for key in unknown if self._filter.takes_key(key)]

    def _live(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The selected tensors of modules, and their aliases."""
        tensors, aliases = self._capture.fixed_tensors()
        apart = self._modules.absent | self._modules.loose
        optimizers = set(self._capture.optimizers)
        kept = {
            name: tensor
            for name, tensor in tensors.items()
            if name.partition(".")[0] not in optimizers and self._takes(name) and name not in apart
        }
        return kept, {alias: name for alias, name in aliases.items() if name in kept}

    def _takes(self, name: str) -> bool:
        """Whether a tensor of a module or optimizer is selected, live or saved."""
        if self._filter.model_only and name.partition(".")[0] not in self._capture.modules:
            return False
        return self._filter.takes(name)

    def _match(self, live: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> Match:
        infos = {name: TensorInfo(from_torch(t.dtype, name), global_shape(t)) for name, t in live.items()}
        fixed = set(self._capture.modules)
        # The tensors of a key that the state lacks are unexpected; entries that are not modules match theirs.
        generic = {PER_RANK_PREFIX, *(key for key in self._capture.state if key not in fixed)}
        # Tensors inside values (extra state) are read with those values.
        inside = {name for key in fixed for name in values.tensor_names(self._saved.json(key))}
        inside = (inside - live.keys()) | self._modules.loose
        saved = {
            name: info
            for name, info in self._manifest.tensors.items()
            if name not in inside and name.partition(".")[0] not in generic and self._takes(name)
        }
        return match_tensors(infos, aliases, saved, self._manifest.aliases)
