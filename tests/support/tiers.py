"""Two tiers for tests of the mirror: a local directory, and another directory or a store in memory."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from engine.directory.listing import committed, list_checkpoints
from engine.directory.retention import Retention
from engine.directory.verify import verify_checkpoint
from engine.errors import NotFoundError
from engine.mirror.uploader import Mirror, MirrorPlan
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage

KINDS = ("directory", "memory")


def second_storage(kind: str, folder: Path) -> Storage:
    """An empty storage of that kind."""
    if kind == "directory":
        return LocalStorage(folder / "mirror")
    return open_storage(f"memory://{uuid.uuid4()}/mirror")


class Desk:
    """A mirror without its thread, and the events that it gave."""

    def __init__(
        self,
        local: Storage,
        second: Storage,
        *,
        freq: int = 1,
        retention: Retention | None = None,
    ) -> None:
        self.local, self.second = local, second
        self.events: list[dict[str, Any]] = []
        self.mirror = Mirror(local, second, MirrorPlan(freq, retention, "tests"), self.events.append)

    def kinds(self) -> list[tuple[str, int | None]]:
        return [(event["event"], event.get("step")) for event in self.events]

    def once(self) -> Desk:
        """Open, one round, and let go again: a run that lives for that long."""
        self.mirror.open()
        try:
            self.mirror.catch_up()
        finally:
            self.mirror.try_release()
        return self


def steps_in(storage: Storage) -> list[int]:
    """The steps of the committed checkpoints, every one verified to the last block."""
    try:
        records = committed(list_checkpoints(storage))
    except NotFoundError:
        return []
    for record in records:
        result = verify_checkpoint(storage, record.id)
        assert result.ok, result.damage
    return [record.step for record in records]


def change_byte(storage: Storage, path: str, at: int = -1) -> None:
    """Flip a bit of a stored file behind everybody's back; its size stays."""
    raw = bytearray(storage.read_bytes(path, max_bytes=1 << 30))
    raw[at] ^= 0x10
    storage.write_file(path, bytes(raw))
