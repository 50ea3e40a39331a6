"""The optimizers of a state, made ready to receive one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from engine.restore import optimizer as one
from engine.restore.saved import Saved
from engine.snapshot.capture import StateCapture
from engine.snapshot.optimizers import OptimizerCapture


class Optimizers:
    """The wanted optimizers. They get state to read into, which `abandon` takes away again.

    Args:
        keys: the wanted state keys.
    """

    def __init__(self, capture: StateCapture, keys: list[str], saved: Saved) -> None:
        self._capture = capture
        self._keys = keys
        self._saved = saved
        self._without_state: dict[str, set[str]] = {}
        self._made_state: list[Optimizer] = []

    def prepare(self) -> None:
        """Give fresh optimizers state to read into, and see which parameters had none when saved."""
        manifest = self._saved.manifest
        names = {*manifest.tensors, *manifest.aliases}
        for key, capture in self._optimizers():
            absent = self._without_state[key] = one.parameters_without_state(
                capture, names, manifest.objects.get(key) or {}
            )
            if any(name not in absent for names in capture.group_names() for name in names):
                module = self._capture.state[capture.owner]
                if one.ensure_state(module, capture.optimizer):
                    self._made_state.append(capture.optimizer)
        if self._made_state:
            self._capture.refresh()

    def drop_unsaved(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take out the state tensors of parameters that had no state when saved."""
        for key, absent in self._without_state.items():
            prefix = f"{key}.state."
            for name in list(tensors):
                if name.startswith(prefix) and name.removeprefix(prefix).rpartition(".")[0] in absent:
                    del tensors[name]

    def differences(self) -> list[str]:
        """One sentence for each group that does not fit."""
        return [
            line
            for key, capture in self._optimizers()
            if key in self._saved.manifest.objects
            for line in one.group_differences(capture, self._document(key))
        ]

    def abandon(self) -> None:
        """Nothing will be read: leave optimizers without the state that was made to read into."""
        for optimizer in self._made_state:
            optimizer.state.clear()

    def finish(self) -> None:
        """Hand every optimizer its values, after all tensors were read."""
        for key, capture in self._optimizers():
            if key in self._saved.manifest.objects:
                one.drop_state(capture, self._without_state[key])
                one.apply_groups(capture, self._document(key))

    def _optimizers(self) -> list[tuple[str, OptimizerCapture]]:
        return [(key, capture) for key, capture in self._capture.optimizers.items() if key in self._keys]

    def _document(self, key: str) -> Mapping[str, Any]:
        document: Mapping[str, Any] = self._saved.document(key)
        return document
