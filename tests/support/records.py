"""Checkpoint records by hand, for tests of decisions that never look at a disk."""

from __future__ import annotations

from engine.directory.record import CheckpointRecord
from engine.format.names import attempt_name


def record(
    sequence: int,
    *,
    step: int | None = None,
    loss: float | None = None,
    reasons: tuple[str, ...] = ("interval",),
    epoch: int = 0,
    root: str = "/runs/a",
    created: float = 0.0,
) -> CheckpointRecord:
    """A record whose id tells its sequence number; step = sequence unless given."""
    id = attempt_name(sequence if step is None else step, f"{sequence:08x}")
    return CheckpointRecord(
        id=id,
        path=f"{root}/{id}",
        step=sequence if step is None else step,
        epoch=epoch,
        tokens=0,
        sequence=sequence,
        parent=None,
        created=created,
        reasons=reasons,
        world_size=2,
        bytes=100,
        manifest_digest=f"{sequence:032x}",
        metrics={} if loss is None else {"val_loss": loss},
    )
