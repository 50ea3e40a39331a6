"""What a mirror is owed, in which order it gets it, and what that keeps in the local directory. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from engine.directory.record import CheckpointRecord
from engine.directory.retention import Decision, Retention, by_sequence, decide_retention

PLAIN_REASONS = frozenset({"interval", "manual"})
"""A checkpoint that was taken for these alone comes round again: `mirror_freq` thins those out."""

PENDING = "the mirror is still owed it"


def is_mirrored(record: CheckpointRecord, mirror_freq: int) -> bool:
    """Whether the mirror is to get a checkpoint: every so many steps, and always for a reason of its own.

    0 mirrors none of the plain ones. By steps like every other frequency, so that it needs no memory.
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
    """The local checkpoints that the mirror still has to get, newest first.

    Newest first because that is what a lost node resumes from: a mirror that is slower than the saves would
    otherwise stay as far behind as the backlog is long. What the mirror's own retention would remove as soon
    as it arrived is not owed any more.
    """
    there = {record.id for record in mirror}
    missing = [record for record in by_sequence(local) if record.id not in there]
    return [
        record
        for record in reversed(missing)
        if is_mirrored(record, mirror_freq) and _would_stay(record, mirror, retention)
    ]


def keep_pending(decisions: Sequence[Decision], pending_ids: Collection[str]) -> list[Decision]:
    """The decisions of the local retention, but for what the mirror is owed: that stays."""
    return [
        replace(decision, keep=True, why=PENDING)
        if not decision.keep and decision.record.id in pending_ids
        else decision
        for decision in decisions
    ]


def pending_to_delete(
    decisions: Sequence[Decision], pending_ids: Collection[str], in_flight: str | None = None
) -> Decision | None:
    """The owed checkpoint to delete when the disk is full: not kept by the policy, with an older owed one.

    `decisions` are the policy's own, oldest first. The oldest owed one stays, so that the mirror's history
    gets gaps before it gets shorter; so does the one being sent, and everything that the policy keeps.
    """
    waiting = [decision for decision in decisions if decision.record.id in pending_ids]
    for decision in waiting[1:]:
        if not decision.keep and decision.record.id != in_flight:
            return replace(decision, why="the disk is full, and an older one is owed to the mirror as well")
    return None


def _would_stay(
    record: CheckpointRecord, mirror: Sequence[CheckpointRecord], retention: Retention | None
) -> bool:
    decisions = decide_retention([*mirror, record], retention)
    return any(decision.keep for decision in decisions if decision.record is record)
