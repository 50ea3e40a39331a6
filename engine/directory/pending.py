"""Which checkpoints are pending: still to be copied to the mirror, and kept locally until then. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from engine.directory.record import CheckpointRecord
from engine.directory.retention import Decision, Retention, by_sequence, decide_retention

PLAIN_REASONS = frozenset({"interval", "manual"})
"""Checkpoints taken only for these are periodic: `mirror_freq` mirrors some of them."""

PENDING = "not yet copied to the mirror"


def is_mirrored(record: CheckpointRecord, mirror_freq: int) -> bool:
    """Whether a run mirrors this checkpoint: any of special reason, and periodic ones by `mirror_freq`.

    0 mirrors no periodic ones. The frequency is in steps, like every other, so that it needs no state.
    """
    if not set(record.reasons) <= PLAIN_REASONS:
        return True
    return mirror_freq > 0 and record.step % mirror_freq == 0


def pending_copies(
    local: Sequence[CheckpointRecord],
    mirror: Sequence[CheckpointRecord],
    mirror_freq: int,
    retention: Retention | None,
) -> list[CheckpointRecord]:
    """The local checkpoints that are still to be copied to the mirror, newest first.

    Newest first because a lost node resumes from the newest: otherwise a mirror slower than the saves would
    lag by the whole backlog. One that the mirror's own retention would delete at once is not pending.
    """
    mirrored = {record.id for record in mirror}
    missing = [record for record in by_sequence(local) if record.id not in mirrored]
    return [
        record
        for record in reversed(missing)
        if is_mirrored(record, mirror_freq) and _would_stay(record, mirror, retention)
    ]


def keep_pending(decisions: Sequence[Decision], pending_ids: Collection[str]) -> list[Decision]:
    """The decisions of the local retention, changed so that pending checkpoints are kept."""
    return [
        replace(decision, keep=True, why=PENDING)
        if not decision.keep and decision.record.id in pending_ids
        else decision
        for decision in decisions
    ]


def pending_to_delete(
    decisions: Sequence[Decision], pending_ids: Collection[str], in_flight: str | None = None
) -> Decision | None:
    """The pending checkpoint to delete when the disk is full: expired, with an older pending one.

    `decisions` are the policy's own, oldest first. The oldest pending one stays, so that the mirror's history
    gets gaps before it gets shorter. The one being sent stays, and all that the policy keeps.
    """
    pending = [decision for decision in decisions if decision.record.id in pending_ids]
    for decision in pending[1:]:
        if not decision.keep and decision.record.id != in_flight:
            return replace(decision, why="the disk is full, and an older one is pending, too")
    return None


def _would_stay(
    record: CheckpointRecord, mirror: Sequence[CheckpointRecord], retention: Retention | None
) -> bool:
    decisions = decide_retention([*mirror, record], retention)
    return any(decision.keep for decision in decisions if decision.record is record)
