"""Verification of whole checkpoints, its counting, and what happens around it. Damage: tests/damaged."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from engine.directory import verify
from engine.directory.listing import committed, list_checkpoints
from engine.directory.verify import verify_checkpoint
from engine.errors import NotFoundError, StorageUnavailableError
from engine.format.digest import BLOCK_BYTES
from engine.format.names import MANIFEST
from engine.storage.base import Entry, Reader
from engine.storage.local import LocalStorage
from tests.support.tiny_checkpoint import write_checkpoint

SHARD = "shard-00000.safetensors"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_whole_one_is_ok_and_every_byte_is_counted(tmp_path: Path, world_size: int) -> None:
    id = write_checkpoint(tmp_path, world_size=world_size)
    (record,) = committed(list_checkpoints(LocalStorage(tmp_path)))
    counted: list[int] = []
    result = verify_checkpoint(LocalStorage(tmp_path), id, progress=counted.append)
    assert (result.id, result.ok, result.damage) == (id, True, ())
    assert result.bytes == sum(counted) == record.bytes


def test_quick_reads_indexes_and_headers_only(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path)
    result = verify_checkpoint(LocalStorage(tmp_path), id, quick=True)
    assert result.ok
    assert result.bytes == (tmp_path / id / "shard-00000.json").stat().st_size + 4096


def test_time_is_taken_from_the_clock_that_was_given(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path)
    times = iter([5.0, 7.5])
    assert verify_checkpoint(LocalStorage(tmp_path), id, clock=lambda: next(times)).secs == 2.5


@pytest.mark.parametrize("window_blocks", [1, 3, 100])
def test_blocks_are_named_right_whatever_is_read_at_a_time(
    tmp_path: Path, window_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "WINDOW_BYTES", window_blocks * BLOCK_BYTES + 17)
    id = write_checkpoint(tmp_path, rows=200)
    path = tmp_path / id / SHARD
    raw = bytearray(path.read_bytes())
    blocks = -(-len(raw) // BLOCK_BYTES)
    bad = [*sorted(random.Random(3).sample(range(1, blocks - 1), 4)), blocks - 1]
    for block in bad:
        raw[min((block + 1) * BLOCK_BYTES, len(raw)) - 1] ^= 0x80
    path.write_bytes(raw)
    result = verify_checkpoint(LocalStorage(tmp_path), id, threads=3)
    assert [damage.block for damage in result.damage] == bad
    assert all(damage.file == SHARD for damage in result.damage)
    assert all(damage.expected != damage.found for damage in result.damage)


def test_a_wiped_file_is_summed_up(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path, rows=500)
    path = tmp_path / id / SHARD
    raw = path.read_bytes()
    path.write_bytes(raw[:4096] + bytes(len(raw) - 4096))
    damage = verify_checkpoint(LocalStorage(tmp_path), id).damage
    blocks = -(-len(raw) // BLOCK_BYTES)
    assert len(damage) == verify.MAX_BLOCKS_NAMED + 1
    assert (
        damage[-1].sentence
        == f"{SHARD}: {blocks - 16} more blocks have changed, {blocks} of {blocks} in total"
    )


def test_all_damage_is_reported_not_only_the_first(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path, world_size=3)
    (tmp_path / id / SHARD).unlink()
    (tmp_path / id / "shard-00001.json").write_bytes(b"{}")
    path = tmp_path / id / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    found = [(damage.file, damage.block) for damage in verify_checkpoint(LocalStorage(tmp_path), id).damage]
    assert found == [(SHARD, None), ("shard-00001.json", None), ("shard-00002.safetensors", 0)]


def test_a_file_that_shrinks_while_it_is_read_is_damage(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path)

    class Stale(LocalStorage):
        """Its listing still shows the old size, as a network file system's may."""

        def list_dir(self, path: str = "") -> list[Entry]:
            found = super().list_dir(path)
            if path == id:
                with open(tmp_path / id / SHARD, "r+b") as file:
                    file.truncate(100_000)
            return found

    (damage,) = verify_checkpoint(Stale(tmp_path), id).damage
    assert "truncated" in damage.sentence


@pytest.mark.parametrize("when", ["after the manifest", "before the blocks"])
def test_one_retired_meanwhile_is_not_called_damaged(tmp_path: Path, when: str) -> None:
    id = write_checkpoint(tmp_path)

    def retire() -> None:
        LocalStorage(tmp_path).delete_tree(id)

    class Retiring(LocalStorage):
        def list_dir(self, path: str = "") -> list[Entry]:
            found = super().list_dir(path) if when != "after the manifest" else []
            retire()
            return found

    with pytest.raises(NotFoundError, match="deleted during the verification"):
        verify_checkpoint(Retiring(tmp_path), id)


def test_an_outage_is_not_damage(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path)

    class Away(LocalStorage):
        def open_reader(self, path: str) -> Reader:
            if path.endswith(".safetensors"):
                raise StorageUnavailableError("away")
            return super().open_reader(path)

    with pytest.raises(StorageUnavailableError):
        verify_checkpoint(Away(tmp_path), id)


def test_an_interrupt_ends_it_without_reading_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "WINDOW_BYTES", BLOCK_BYTES)
    id = write_checkpoint(tmp_path, rows=1000)
    calls: list[int] = []

    def interrupt(count: int) -> None:
        calls.append(count)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_checkpoint(LocalStorage(tmp_path), id, progress=interrupt, threads=1)
    assert len(calls) <= verify._BATCH + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("holdfast-verify")]


def test_one_under_a_new_name_is_verified_too(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path)
    (tmp_path / id).rename(tmp_path / "mine")
    assert verify_checkpoint(LocalStorage(tmp_path), "mine").ok
    (tmp_path / "mine" / MANIFEST).unlink()
    with pytest.raises(NotFoundError):
        verify_checkpoint(LocalStorage(tmp_path), "mine")
