"""Which checkpoints a newer commit has made surplus: a pure decision over committed records.

Only committed checkpoints are ever handed in: counting an attempt that may yet fail would delete the last
good one in its favour. Latest, backup and best stay under every policy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.catalog.record import CheckpointRecord
from engine.errors import ConfigError

EPOCH_REASON = "epoch"
"""The reason that an epoch's closing checkpoint carries."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints to keep. In place of a policy, None keeps all."""

    rolling: int = 10
    """The newest so many. Latest and backup stay even at 0."""
    best: int = 1
    """Those with the so many lowest validation losses. The best one stays even at 0."""
    epochs: bool = True
    """Keep every checkpoint that closed an epoch, for ever."""

    def __post_init__(self) -> None:
        for name, value in (("rolling", self.rolling), ("best", self.best)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"Retention({name}={value!r}): give a number of checkpoints, 0 or more")


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one checkpoint, and why in words for a person."""

    record: CheckpointRecord
    keep: bool
    why: str


def by_sequence(records: Collection[CheckpointRecord]) -> list[CheckpointRecord]:
    """Oldest first. Equal numbers (a directory copied in by hand) fall back on the id, so that all agree."""
    return sorted(records, key=lambda record: (record.sequence, record.id))


def by_loss(records: Collection[CheckpointRecord]) -> list[CheckpointRecord]:
    """Lowest validation loss first, of equals the older; those without a finite one are left out."""
    scored = [record for record in records if record.val_loss is not None]
    return sorted(scored, key=lambda record: (record.val_loss, record.sequence, record.id))


def closes_epoch(record: CheckpointRecord) -> bool:
    """Whether it was saved because its epoch ended."""
    return EPOCH_REASON in record.reasons


def roles(
    records: Collection[CheckpointRecord], retention: Retention | None = None
) -> dict[str, tuple[str, ...]]:
    """By id, newest first, what a record serves as: of latest, backup, best, epoch, rolling, in that order.

    `best` marks as many as the policy keeps; the lowest of them is what the selector `best` finds.
    """
    policy = retention or Retention(rolling=len(records))
    newest = [record.id for record in reversed(by_sequence(records))]
    members = {
        "latest": set(newest[:1]),
        "backup": set(newest[1:2]),
        "best": {record.id for record in by_loss(records)[: max(1, policy.best)]},
        "epoch": {record.id for record in records if policy.epochs and closes_epoch(record)},
        "rolling": set(newest[: policy.rolling]),
    }
    return {id: tuple(name for name, ids in members.items() if id in ids) for id in newest}


def surplus(
    records: Sequence[CheckpointRecord],
    retention: Retention | None,
    held: Collection[str] = frozenset(),
) -> list[Decision]:
    """Decide on every record, oldest first. `held`: ids that someone has exempted by hand."""
    ordered = by_sequence(records)
    if retention is None:
        return [Decision(record, True, "everything is kept") for record in ordered]
    serving = roles(records, retention)
    return [_decide(record, serving[record.id], retention, record.id in held) for record in ordered]


def _decide(record: CheckpointRecord, serving: tuple[str, ...], retention: Retention, held: bool) -> Decision:
    wording = {
        "latest": "latest",
        "backup": "backup",
        "best": f"best (val loss {record.val_loss:.6g})" if record.val_loss is not None else "best",
        "epoch": f"closed epoch {record.epoch}",
        "rolling": f"among the newest {retention.rolling}",
    }
    why = [wording[name] for name in serving]
    if held:
        why.append("held")
    if why:
        return Decision(record, True, ", ".join(why))
    return Decision(record, False, f"older than the newest {max(2, retention.rolling)}, {_not_best(record)}")


def _not_best(record: CheckpointRecord) -> str:
    if record.val_loss is None:
        return "without a validation loss"
    return f"val loss {record.val_loss:.6g} is not best"
