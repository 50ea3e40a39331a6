"""The optimizers of a state, made ready to receive one checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from engine.restore.filters import Wanted
from engine.restore.matching import Fit
from engine.restore.optimizer_state import OptimizerRestore
from engine.restore.saved import Saved
from engine.state.capture import StateCapture
from engine.state.optimizer_document import is_optimizer, parse


class Optimizers:
    """The wanted optimizers, each with what the checkpoint has for it. Nothing changes before `finish`.

    Attributes:
        tensors: what to read, by a name of the destination.
        fit: how the saved state fits.
    """

    def __init__(self, capture: StateCapture, saved: Saved, wanted: Wanted) -> None:
        self._parts: list[OptimizerRestore] = []
        self.tensors: dict[str, torch.Tensor] = {}
        matched: dict[str, str] = {}
        grown: dict[str, str] = {}
        lines: list[str] = []
        unexpected: list[str] = []
        for key, one in capture.optimizers.items():
            document = saved.manifest.objects.get(key)
            if wanted.model_only or key not in saved.keys or not _takes_some(wanted, key, document, saved):
                continue
            if not isinstance(document, dict) or "param_groups" not in document:
                lines.append(f"{key}: an optimizer here, saved as something else")
                continue
            known = [name for name in saved.manifest.tensors if name.startswith(f"{key}.")]
            part = OptimizerRestore(one, document, known, saved, wanted)
            self._parts.append(part)
            self.tensors |= part.tensors
            matched |= part.sources
            grown |= part.grown
            lines += part.lines
            unexpected += part.unexpected
        self.fit = Fit(matched, (), tuple(unexpected), tuple(lines), grown)

    def finish(self) -> None:
        """Hand every optimizer its state, after all tensors were read."""
        for part in self._parts:
            part.finish()


def _takes_some(wanted: Wanted, key: str, document: Any, saved: Saved) -> bool:
    if wanted.takes_key(key):
        return True
    names = [name for name in saved.manifest.tensors if name.startswith(f"{key}.")]
    if is_optimizer(document):
        told = parse(key, document)
        names += [f"{key}.param_groups.{name}" for group in told.groups for name in group]
        names += [f"{key}.state.{path}" for path in told.counters]
        names += [f"{key}.state.{name}" for name, _ in told.extra]
    return any(wanted.takes_value(key, name) for name in names)
