"""How often a resume lists the directory: on a store each listing is a request or several, before step 1."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.format.names import MANIFEST
from engine.run.config import TrainConfig
from engine.run.start import Restart, find_start
from engine.storage.base import Entry, Heads
from engine.storage.local import LocalStorage


def state() -> dict[str, Any]:
    return {"values": {"n": 0, "t": torch.zeros(4)}}


def write(directory: Path, *steps: int) -> list[str]:
    """One checkpoint a step; the value is the step. Returns the ids."""
    live = state()
    ids = []
    with Checkpointer(directory, live, retention=None) as checkpointer:
        for step in steps:
            live["values"]["n"] = step
            record = checkpointer.save(step).result(60)
            assert record is not None
            ids.append(record.id)
    return ids


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Listings, looks at the names in the directory alone, and reads of manifests by checkpoint."""
    counts: Counter[str] = Counter()
    list_heads, list_dir, read_bytes = LocalStorage.list_heads, LocalStorage.list_dir, LocalStorage.read_bytes
    listing: list[str] = []

    def counting_heads(storage: LocalStorage) -> Heads:
        counts["listings"] += 1
        listing.append("")
        try:
            return list_heads(storage)
        finally:
            listing.pop()

    def counting_dir(storage: LocalStorage, path: str = "") -> list[Entry]:
        if not listing:
            counts[f"names of {path}" if path else "names"] += 1
        return list_dir(storage, path)

    def counting_bytes(storage: LocalStorage, path: str, *, max_bytes: int) -> bytes:
        if path.endswith(MANIFEST):
            counts[path.partition("/")[0]] += 1
        return read_bytes(storage, path, max_bytes=max_bytes)

    monkeypatch.setattr(LocalStorage, "list_heads", counting_heads)
    monkeypatch.setattr(LocalStorage, "list_dir", counting_dir)
    monkeypatch.setattr(LocalStorage, "read_bytes", counting_bytes)
    return counts


def test_a_resume_lists_the_directory_twice(tmp_path: Path, asked: Counter[str]) -> None:
    """Once to find the checkpoint and its flags, once under the lease: taking over and restoring share it."""
    ids = write(tmp_path, 1, 2, 3)
    asked.clear()
    config = TrainConfig(checkpoint_dir=str(tmp_path), resume="latest")
    start = find_start(config, directory_given=True, restart=Restart())
    assert start.selector == "latest"
    live = state()
    with Checkpointer(tmp_path, live) as checkpointer:
        record = checkpointer.restore("latest")
        assert record is not None
        assert live["values"]["n"] == 3
        assert asked["listings"] == 2
        assert {id: asked[id] for id in ids} == dict.fromkeys(ids, 2)
        # To find the newest lease, to see that nobody else took it, to keep it; and for the restore.
        assert asked["names"] <= 4


def test_what_a_dead_run_left_costs_no_further_listing(tmp_path: Path, asked: Counter[str]) -> None:
    (id,) = write(tmp_path, 1)
    (tmp_path / f"dead-{id[:-1]}0").mkdir()
    (tmp_path / f"dead-{id[:-1]}0" / "shard-00000.safetensors").write_bytes(b"half")
    asked.clear()
    with Checkpointer(tmp_path, state()) as checkpointer:
        assert not list(tmp_path.glob("dead-*"))
        assert checkpointer.restore("latest") is not None
        assert asked["listings"] == 1


@pytest.mark.parametrize("arrives", ["whole", "last of all its manifest"])
def test_what_was_copied_in_since_is_restored(tmp_path: Path, asked: Counter[str], arrives: str) -> None:
    write(tmp_path / "run", 1)
    (newer,) = write(tmp_path / "other", 1, 2)[1:]
    copy, manifest = tmp_path / "run" / newer, tmp_path / "other" / newer / MANIFEST
    if arrives != "whole":
        shutil.copytree(tmp_path / "other" / newer, copy, ignore=shutil.ignore_patterns(MANIFEST))
    live = state()
    with Checkpointer(tmp_path / "run", live) as checkpointer:
        asked.clear()
        if arrives == "whole":
            shutil.copytree(tmp_path / "other" / newer, copy)
        else:
            shutil.copy(manifest, copy / MANIFEST)
        assert checkpointer.restore("latest") is not None
        assert live["values"]["n"] == 2
        assert asked["listings"] == 1


def test_what_was_deleted_since_is_not_asked_for(
    tmp_path: Path, asked: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = write(tmp_path, 1, 2)
    with Checkpointer(tmp_path, state()) as checkpointer:
        shutil.rmtree(tmp_path / second)
        asked.clear()
        record = checkpointer.restore("latest")
        assert record is not None
        assert record.id == first
        assert asked["listings"] == 1
        assert second not in asked
        assert second not in caplog.text


def test_damage_since_then_is_met_and_the_next_choice_lists_anew(tmp_path: Path, asked: Counter[str]) -> None:
    first, second = write(tmp_path, 1, 2)
    with Checkpointer(tmp_path, state()) as checkpointer:
        with open(tmp_path / second / "shard-00000.safetensors", "ab") as file:
            file.truncate(100)
        asked.clear()
        record = checkpointer.restore("latest")
        assert record is not None
        assert record.id == first
        assert asked["listings"] == 1


def test_only_the_first_restore_uses_it(tmp_path: Path, asked: Counter[str]) -> None:
    write(tmp_path, 1, 2)
    with Checkpointer(tmp_path, state()) as checkpointer:
        asked.clear()
        checkpointer.restore("latest")
        assert asked["listings"] == 0
        checkpointer.restore("latest")
        assert asked["listings"] == 1


def test_after_a_save_the_restore_lists_anew(tmp_path: Path, asked: Counter[str]) -> None:
    write(tmp_path, 1)
    live = state()
    with Checkpointer(tmp_path, live, retention=None) as checkpointer:
        live["values"]["n"] = 5
        checkpointer.save(5).result(60)
        live["values"]["n"] = 0
        checkpointer.restore("latest")
        assert live["values"]["n"] == 5
