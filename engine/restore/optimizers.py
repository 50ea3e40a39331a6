"""The optimizers of a state, made ready to receive one checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.restore.fit import Fit
from engine.restore.optimizer import OptimizerRestore
from engine.restore.saved import Saved
from engine.restore.wanted import Wanted
from engine.snapshot.capture import StateCapture


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
            if wanted.model_only or key not in saved.keys or not _takes_some(wanted, key, saved):
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


def _takes_some(wanted: Wanted, key: str, saved: Saved) -> bool:
    names: Iterable[str] = (name for name in saved.manifest.tensors if name.startswith(f"{key}."))
    return wanted.takes_key(key) or any(wanted.takes(name) for name in names)
