"""The record of a committed checkpoint: the values of its manifest that selection and retention use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.format.best import DEFAULT, BestRule
from engine.format.digest import bytes_digest
from engine.format.manifest import Manifest

VAL_LOSS = "val_loss"
"""The default metric of `best`; lower is better."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A committed checkpoint. Order among records is by `sequence` alone, never by step or clock."""

    id: str
    """The name of its directory."""
    path: str
    """Printable path or URI of its directory, as `--resume` and the commands accept it."""
    step: int
    epoch: int
    tokens: int
    sequence: int
    """One above the highest in the directory when it was committed."""
    parent: str | None
    """The id of the checkpoint that its run had restored or saved last, if any."""
    created: float
    """Unix time in seconds, by the clock of the machine that committed. For display only."""
    reasons: tuple[str, ...]
    world_size: int
    bytes: int
    """Size of all shard files and indexes."""
    manifest_digest: str
    """Digest of the stored manifest: two records with the same digest are the same checkpoint."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: BestRule = DEFAULT
    """How its run decides which checkpoint is best."""

    @property
    def val_loss(self) -> float | None:
        """The validation loss; None if it is missing or not finite."""
        return DEFAULT.value(self.metrics)


def from_manifest(
    manifest: Manifest, root_uri: str, *, name: str | None = None, manifest_digest: str = ""
) -> CheckpointRecord:
    """The record of a checkpoint in the directory `name` (default: its id) of the storage `root_uri`.

    `manifest_digest`: of the manifest's bytes, if known; otherwise it is computed.
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
