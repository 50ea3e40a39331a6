"""Metrics of torchmetrics: what they accumulate is in state_dict() only once it is declared persistent.

Inside a model that is respected, as it is for buffers. A metric that is an entry of its own has nothing else
to save, so there it is captured in any case, and comes back in the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.state.wrappers import Place, loaded_class

UPDATE_COUNTS = "_update_counts"
"""Among a metric's values: how often each was updated. Means over batches are weighted by it."""


def metric_values(tree: Sequence[Place]) -> dict[str, Any]:
    """The state of a metric that is an entry of its own, by names as in state_dict(); {} for all others."""
    metrics = _metrics(tree)
    if not metrics:
        return {}
    found: dict[str, Any] = {
        place.spelled + name: _detached(value)
        for place in metrics
        for name, value in place.module.metric_state.items()
    }
    found[UPDATE_COUNTS] = {place.name: place.module.update_count for place in metrics}
    return found


def set_update_counts(tree: Sequence[Place], counts: Mapping[str, int]) -> None:
    """Give metrics the number of their updates; a value computed from other state is forgotten."""
    for place in _metrics(tree):
        if place.name in counts:
            # Private: load_state_dict() sets neither.
            place.module._update_count = counts[place.name]
            place.module._computed = None


def _metrics(tree: Sequence[Place]) -> list[Any]:
    metric = loaded_class("torchmetrics.metric", "Metric")
    collection = loaded_class("torchmetrics.collections", "MetricCollection")
    if metric is None or not isinstance(tree[0].module, (metric, collection or metric)):
        return []
    return [place for place in tree if isinstance(place.module, metric)]


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    return [_detached(item) for item in value] if isinstance(value, list) else value
