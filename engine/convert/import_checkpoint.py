"""`import`: commits a foreign checkpoint as a Holdfast checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from engine.convert.adopt import adopt
from engine.convert.incoming import incoming
from engine.convert.model_kinds import ModelKind
from engine.convert.publish import publish
from engine.convert.tensors import Progress, ignore_progress
from engine.directory.record import CheckpointRecord
from engine.storage.open import open_storage


def import_checkpoint(
    address: str,
    directory: str,
    *,
    kinds: Sequence[ModelKind] = (),
    storage_options: Mapping[str, str] | None = None,
    trust_pickle: bool = False,
    on_total: Callable[[int], None] = ignore_progress,
    progress: Progress = ignore_progress,
) -> tuple[CheckpointRecord, tuple[str, ...]]:
    """Import the checkpoint at `address` into `directory`; both are paths or URIs.

    A model that one of `kinds` recognises is converted; any other keeps its names, types and layout.
    Returns the committed record, with reason "import", and notes for the user, in sentences.
    `on_total` is called with the total tensor bytes, before the first tensor is read.
    Raises: ConfigError or StateError if it cannot be imported; DamagedError; NotFoundError;
        DirectoryHeldError while a run writes to the directory; StorageError. Then nothing is committed.
    """
    with incoming(address, options=storage_options, trust_pickle=trust_pickle) as found:
        draft, notes = adopt(found, kinds)
        on_total(draft.total_bytes)
        return publish(open_storage(directory, storage_options), draft, progress), notes
