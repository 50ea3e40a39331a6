"""The retention policy: which checkpoints to keep, and which have expired. Pure.

It sees only committed checkpoints: if it counted an attempt that may still fail, it could delete the last
good checkpoint. Latest, backup and best are kept under every policy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.directory.record import CheckpointRecord
from engine.errors import ConfigError
from engine.format.best import DEFAULT, BestRule, Mode

EPOCH_REASON = "epoch"
"""The reason of a checkpoint that closes an epoch."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints to keep; the others are deleted after each commit. None instead of it keeps all."""

    rolling: int = 10
    """How many of the newest to keep. Latest and backup are kept even at 0."""
    best: int = 1
    """How many of the best by `metric` to keep. The best one is kept even at 0."""
    epochs: bool = True
    """Keep every checkpoint that closed an epoch."""
    metric: str = "val_loss"
    """The metric, of those given to `save`, that decides which is best."""
    mode: Mode = "min"
    """Whether its lowest ("min") or its highest ("max") value is best."""

    @property
    def rule(self) -> BestRule:
        """How to decide which is best."""
        return BestRule(self.metric, self.mode)

    def __post_init__(self) -> None:
        try:
            _ = self.rule
        except ValueError as error:
            raise ConfigError(f"Retention(metric={self.metric!r}, mode={self.mode!r}): {error}") from None
        for name, value in (("rolling", self.rolling), ("best", self.best)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"Retention({name}={value!r}): give a number of checkpoints, 0 or more")


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to keep one checkpoint, and a readable reason."""

    record: CheckpointRecord
    keep: bool
    why: str


def by_sequence(records: Collection[CheckpointRecord]) -> list[CheckpointRecord]:
    """Oldest first. Equal numbers (a directory copied in by hand) are ordered by id."""
    return sorted(records, key=lambda record: (record.sequence, record.id))


def best_first(records: Collection[CheckpointRecord], rule: BestRule) -> list[CheckpointRecord]:
    """Best first, of equals the older first; those without a finite value are left out."""
    scored = [(value, r) for r in records if (value := rule.value(r.metrics)) is not None]
    scored.sort(key=lambda pair: (rule.badness(pair[0]), pair[1].sequence, pair[1].id))
    return [record for _, record in scored]


def rule_of(records: Collection[CheckpointRecord]) -> BestRule:
    """How the run that wrote the newest of them decides which is best."""
    newest = max(records, key=lambda record: (record.sequence, record.id), default=None)
    return DEFAULT if newest is None else newest.best


def metrics_of(records: Iterable[CheckpointRecord]) -> list[str]:
    """The names of the metrics that have a finite value in any of them."""
    return sorted({name for r in records for name, value in r.metrics.items() if math.isfinite(value)})


def metrics_in_words(records: Iterable[CheckpointRecord]) -> str:
    """The available metrics, for a message that the requested one is missing."""
    records = list(records)
    if finite := metrics_of(records):
        return f"available metrics: {', '.join(finite)}"
    never = sorted({name for record in records for name in record.metrics})
    return f"never finite: {', '.join(never)}" if never else "no metrics are stored"


def closes_epoch(record: CheckpointRecord) -> bool:
    """Whether it was saved because its epoch ended."""
    return EPOCH_REASON in record.reasons


def roles(
    records: Collection[CheckpointRecord], retention: Retention | None = None
) -> dict[str, tuple[str, ...]]:
    """By id, newest first, the roles of each record: of latest, backup, best, epoch, rolling, in that order.

    `best` goes to as many as the policy keeps; the selector `best` finds the first of them. Without a policy,
    the newest checkpoint's run defines `best`, and all are rolling.
    """
    rule = rule_of(records)
    policy = retention or Retention(rolling=len(records), metric=rule.metric, mode=rule.mode)
    newest = [record.id for record in reversed(by_sequence(records))]
    members = {
        "latest": set(newest[:1]),
        "backup": set(newest[1:2]),
        "best": {record.id for record in best_first(records, policy.rule)[: max(1, policy.best)]},
        "epoch": {record.id for record in records if policy.epochs and closes_epoch(record)},
        "rolling": set(newest[: policy.rolling]),
    }
    return {id: tuple(name for name, ids in members.items() if id in ids) for id in newest}


def no_best_warning(records: Sequence[CheckpointRecord], retention: Retention) -> str:
    """The warning that nothing is kept as best, because no checkpoint has the metric; "" if one has.

    A run that uses the default and gives no metrics at all is not warned.
    """
    if not records or best_first(records, retention.rule):
        return ""
    asked = retention.rule != DEFAULT or retention.best > 1
    if not asked and not any(record.metrics for record in records):
        return ""
    there = metrics_in_words(records)
    extreme = "lowest" if retention.mode == "min" else "highest"
    return (
        f"no checkpoint is kept as best: retention looks for the {extreme} {retention.metric!r}, and no "
        f"checkpoint has a finite value of it ({there}). Pass it to save(metrics={{...}}), or choose another "
        "with Retention(metric=..., mode=...)"
    )


def decide_retention(
    records: Sequence[CheckpointRecord],
    retention: Retention | None,
    exempt: Collection[str] = frozenset(),
) -> list[Decision]:
    """Decide which records to keep, oldest first. `exempt`: ids always kept; a mapping also says why."""
    ordered = by_sequence(records)
    if retention is None:
        return [Decision(record, True, "everything is kept") for record in ordered]
    serving = roles(records, retention)
    why = exempt if isinstance(exempt, Mapping) else dict.fromkeys(exempt, "held")
    return [_decide(record, serving[record.id], retention, why.get(record.id, "")) for record in ordered]


def _decide(
    record: CheckpointRecord, serving: tuple[str, ...], retention: Retention, exempt: str
) -> Decision:
    value, label = retention.rule.value(record.metrics), retention.rule.label
    wording = {
        "latest": "latest",
        "backup": "backup",
        "best": f"best ({label} {value:.6g})" if value is not None else "best",
        "epoch": f"closed epoch {record.epoch}",
        "rolling": f"among the newest {retention.rolling}",
    }
    why = [wording[name] for name in serving]
    if exempt:
        why.append(exempt)
    if why:
        return Decision(record, True, ", ".join(why))
    older = f"older than the newest {max(2, retention.rolling)}"
    return Decision(record, False, f"{older}, {_not_best(value, retention.rule)}")


def _not_best(value: float | None, rule: BestRule) -> str:
    if value is None:
        return "without a validation loss" if rule == DEFAULT else f"without a finite {rule.metric}"
    return f"{rule.label} {value:.6g} is not best"
