"""Metrics of torchmetrics: their state is in state_dict() only when it is declared persistent.

Inside a model that declaration is respected, as for buffers. A metric that is a state entry has nothing else
to save, so its state is always captured, and a restore continues in the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.state.wrappers import NamedModule, loaded_class

UPDATE_COUNTS = "_update_counts"
"""Among a metric's values: how often each was updated; means over batches are weighted by it."""


def metric_values(tree: Sequence[NamedModule]) -> dict[str, Any]:
    """The state of a metric that is a state entry, by the names of state_dict(); {} for any other module."""
    metrics = _metrics(tree)
    if not metrics:
        return {}
    found: dict[str, Any] = {
        named.prefix + name: _detached(value)
        for named in metrics
        for name, value in named.module.metric_state.items()
    }
    found[UPDATE_COUNTS] = {named.name: named.module.update_count for named in metrics}
    return found


def set_update_counts(tree: Sequence[NamedModule], counts: Mapping[str, int]) -> None:
    """Set how often each metric was updated, and drop values computed from its earlier state."""
    for named in _metrics(tree):
        if named.name in counts:
            # Private: load_state_dict() sets neither.
            named.module._update_count = counts[named.name]
            named.module._computed = None


def _metrics(tree: Sequence[NamedModule]) -> list[Any]:
    metric = loaded_class("torchmetrics.metric", "Metric")
    collection = loaded_class("torchmetrics.collections", "MetricCollection")
    if metric is None or not isinstance(tree[0].module, (metric, collection or metric)):
        return []
    return [named for named in tree if isinstance(named.module, metric)]


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    return [_detached(item) for item in value] if isinstance(value, list) else value
