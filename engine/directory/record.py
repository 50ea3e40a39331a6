"""One committed checkpoint as the rest of the program talks about it: a few values out of its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.format.best import DEFAULT, BestRule
from engine.format.digest import bytes_digest
from engine.format.manifest import Manifest

VAL_LOSS = "val_loss"
"""The metric that `best` is decided by where nothing else is said; lower is better."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A committed checkpoint. Order among records is by `sequence` alone, never by step or clock."""

    id: str
    """The name of its directory."""
    path: str
    """Printable path or URI of its directory; what `--resume` and the programs accept."""
    step: int
    epoch: int
    tokens: int
    sequence: int
    """One above the highest in the directory when it was committed."""
    parent: str | None
    """The id of the checkpoint that its run had last restored or saved, if any."""
    created: float
    """Unix time in seconds, by the clock of the machine that committed. For display only."""
    reasons: tuple[str, ...]
    world_size: int
    bytes: int
    """Size of all shard files and indexes."""
    manifest_digest: str
    """Of the manifest's bytes as they stand in storage: two records are one checkpoint if it is equal."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: BestRule = DEFAULT
    """By what its run decides which checkpoint is best."""

    @property
    def val_loss(self) -> float | None:
        """The validation loss, or None where there is none or it is not finite."""
        return DEFAULT.value(self.metrics)


def from_manifest(
    manifest: Manifest, root_uri: str, *, name: str | None = None, manifest_digest: str = ""
) -> CheckpointRecord:
    """The record of a checkpoint in the directory `name` (default: its id) of the storage `root_uri`.

    `manifest_digest`: of the manifest's bytes, where it is known; they are serialised again otherwise.
    """
    return CheckpointRecord(
        id=manifest.id,
        path=f"{root_uri.rstrip('/')}/{name or manifest.id}",
        step=manifest.step,
        epoch=manifest.epoch,
        tokens=manifest.tokens,
        sequence=manifest.sequence,
        parent=manifest.parent,
        created=manifest.created,
        reasons=manifest.reasons,
        world_size=manifest.world_size,
        bytes=manifest.total_bytes,
        manifest_digest=manifest_digest or bytes_digest(manifest.to_bytes()),
        metrics=dict(manifest.metrics),
        best=manifest.best,
    )
