"""Listing a directory: what counts as committed, partial and damaged, and that an outage is never empty."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.directory import marks
from engine.directory.listing import (
    Memory,
    committed,
    highest_sequence,
    is_checkpoint_dir,
    list_checkpoints,
    read_index,
    read_manifest,
)
from engine.errors import DamagedError, NotFoundError, StorageUnavailableError
from engine.format.digest import bytes_digest
from engine.format.names import MANIFEST
from engine.storage.local import LocalStorage
from tests.support.storages import StoreLike
from tests.support.tiny_checkpoint import rewrite_index, rewrite_manifest, write_checkpoint


def test_by_sequence_then_unreadable_then_partial(tmp_path: Path) -> None:
    partial = write_checkpoint(tmp_path, sequence=9, step=1, commit=False)
    broken = write_checkpoint(tmp_path, sequence=8, step=2)
    (tmp_path / broken / MANIFEST).write_bytes(b"{}")
    newest = write_checkpoint(tmp_path, sequence=3, step=100)
    oldest = write_checkpoint(tmp_path, sequence=1, step=500)
    short = write_checkpoint(tmp_path, sequence=2, step=300)
    os.truncate(tmp_path / short / "shard-00000.safetensors", 10)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / MANIFEST).write_bytes(b"{}")
    (tmp_path / "lease-00000001").write_bytes(b"")

    listed = list_checkpoints(LocalStorage(tmp_path))
    assert [(item.id, item.status) for item in listed] == [
        (oldest, "committed"),
        (short, "damaged"),
        (newest, "committed"),
        (broken, "damaged"),
        (partial, "partial"),
    ]
    assert [record.id for record in committed(listed)] == [oldest, newest]
    assert highest_sequence(listed) == 3
    assert listed[1].reason.startswith("shard-00000.safetensors has 10 bytes")
    assert [item.step for item in listed] == [500, 300, 100, 2, 1]


def test_a_damaged_one_still_counts_for_the_next_sequence_number(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, sequence=4)
    newest = write_checkpoint(tmp_path, sequence=5)
    marks.mark_damaged(LocalStorage(tmp_path), newest, "block 3")
    assert highest_sequence(list_checkpoints(LocalStorage(tmp_path))) == 5
    assert highest_sequence([]) == 0


def test_a_record_says_what_the_manifest_says(tmp_path: Path) -> None:
    id = write_checkpoint(
        tmp_path,
        sequence=2,
        step=250,
        world_size=2,
        epoch=3,
        tokens=1000,
        parent="step-00000001-00000001",
        reasons=("epoch", "best"),
        metrics={"val_loss": 3.25, "other": float("nan")},
    )
    (item,) = list_checkpoints(LocalStorage(tmp_path))
    record = item.record
    assert record is not None
    assert (record.id, record.path) == (id, str(tmp_path / id))
    assert (record.step, record.epoch, record.tokens, record.sequence) == (250, 3, 1000, 2)
    assert (record.parent, record.reasons, record.world_size) == (
        "step-00000001-00000001",
        ("epoch", "best"),
        2,
    )
    assert record.val_loss == 3.25
    assert record.created == 1.7e9 + 2
    on_disk = {path.name: path.stat().st_size for path in (tmp_path / id).iterdir()}
    assert item.bytes == record.bytes == sum(on_disk.values()) - on_disk[MANIFEST]
    assert record.manifest_digest == bytes_digest((tmp_path / id / MANIFEST).read_bytes())


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_none(tmp_path: Path, loss: float) -> None:
    write_checkpoint(tmp_path, metrics={"val_loss": loss})
    (record,) = committed(list_checkpoints(LocalStorage(tmp_path)))
    assert record.val_loss is None


def test_a_file_that_vanished_or_does_not_belong_is_damage(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path, world_size=2)
    (tmp_path / id / "shard-00001.json").unlink()
    (tmp_path / id / "shard-00002.safetensors").write_bytes(b"")
    (item,) = list_checkpoints(LocalStorage(tmp_path))
    assert item.status == "damaged"
    assert "shard-00001.json is missing" in item.reason
    assert "(and 1 more)" in item.reason


def test_a_directory_copied_under_another_name_is_not_taken_for_a_second_one(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path)
    copy = id[:-1] + "f"
    (tmp_path / id).rename(tmp_path / copy)
    (item,) = list_checkpoints(LocalStorage(tmp_path))
    assert (item.id, item.status) == (copy, "damaged")
    assert id in item.reason


def test_dead_attempts_are_partial_even_with_a_manifest(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path, step=7)
    (tmp_path / id).rename(tmp_path / f"dead-{id}")
    (item,) = list_checkpoints(LocalStorage(tmp_path))
    assert (item.id, item.status, item.step) == (f"dead-{id}", "partial", 7)
    assert "abandoned" in item.reason


def test_the_mark_damaged_is_listed_with_its_reason(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    id = write_checkpoint(tmp_path)
    marks.mark_damaged(storage, id, "shard-00000.safetensors: block 3")
    (item,) = list_checkpoints(storage)
    assert (item.status, item.reason) == ("damaged", "shard-00000.safetensors: block 3")
    marks.mark_damaged(storage, id, "worse")
    assert list_checkpoints(storage)[0].reason == "worse"


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"reason":1}', b"x" * 100_000])
def test_a_mark_that_cannot_be_read_still_counts(tmp_path: Path, raw: bytes) -> None:
    id = write_checkpoint(tmp_path)
    (tmp_path / id / "damaged.json").write_bytes(raw)
    (item,) = list_checkpoints(LocalStorage(tmp_path))
    assert item.status == "damaged"
    assert "damaged.json" in item.reason


def test_one_that_is_retired_while_listing_is_left_out(tmp_path: Path) -> None:
    stays, goes = write_checkpoint(tmp_path, sequence=1), write_checkpoint(tmp_path, sequence=2)

    class Retiring(LocalStorage):
        def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
            if path == f"{goes}/{MANIFEST}":
                (tmp_path / path).unlink(missing_ok=True)
            return super().read_bytes(path, max_bytes=max_bytes)

    assert [item.id for item in list_checkpoints(Retiring(tmp_path))] == [stays]


def test_an_outage_is_not_an_empty_directory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)

    class Away(LocalStorage):
        def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
            raise StorageUnavailableError("away")

    with pytest.raises(StorageUnavailableError):
        list_checkpoints(Away(tmp_path))
    with pytest.raises(NotFoundError):
        list_checkpoints(LocalStorage(tmp_path / "nowhere"))


def test_a_store_is_read_side_by_side_in_the_same_order(tmp_path: Path) -> None:
    for sequence in range(1, 6):
        write_checkpoint(tmp_path, sequence=sequence, step=100 - sequence)
    assert [i.record and i.record.sequence for i in list_checkpoints(StoreLike(tmp_path))] == [1, 2, 3, 4, 5]


def test_held_ones_are_listed_as_held(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one, two = write_checkpoint(tmp_path, sequence=1), write_checkpoint(tmp_path, sequence=2)
    marks.hold(storage, two)
    assert [(item.id, item.on_hold, item.status) for item in list_checkpoints(storage)] == [
        (one, False, "committed"),
        (two, True, "committed"),
    ]
    marks.release(storage, two)
    marks.release(storage, two)
    assert [item.on_hold for item in list_checkpoints(storage)] == [False, False]


def test_only_a_committed_one_can_be_held(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    id = write_checkpoint(tmp_path, commit=False)
    with pytest.raises(NotFoundError, match="not a committed checkpoint"):
        marks.hold(storage, id)
    with pytest.raises(NotFoundError):
        marks.release(storage, id)
    assert [item.on_hold for item in list_checkpoints(storage)] == [False]


def test_a_checkpoint_directory_is_told_from_one_that_holds_some(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path)
    assert not is_checkpoint_dir(LocalStorage(tmp_path))
    assert is_checkpoint_dir(LocalStorage(tmp_path / id))


def test_reading_an_index_checks_it_against_the_receipt(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    id = write_checkpoint(tmp_path, world_size=2)
    manifest = read_manifest(storage, id)
    assert read_index(storage, manifest, 1).rank == 1

    path = tmp_path / id / "shard-00001.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"model.b", b"model.c"))
    with pytest.raises(DamagedError, match=r"shard-00001\.json has changed: its digest is"):
        read_index(storage, manifest, 1)
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedError, match=rf"has {len(whole) - 1} bytes: {len(whole)} were written"):
        read_index(storage, manifest, 1)


def test_an_index_of_another_checkpoint_or_rank_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one = write_checkpoint(tmp_path, sequence=1, world_size=2)
    two = write_checkpoint(tmp_path, sequence=2, world_size=2)
    rewrite_index(tmp_path / two, 0, (tmp_path / one / "shard-00000.json").read_bytes())
    with pytest.raises(DamagedError, match=f"belongs to rank 0 of 2 of {one}, not to rank 0 of 2 of {two}"):
        read_index(storage, read_manifest(storage, two), 0)


def test_an_index_that_describes_other_files_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one = write_checkpoint(tmp_path / "a", seed=1)
    write_checkpoint(tmp_path / "b", seed=2)
    rewrite_index(tmp_path / "a" / one, 0, (tmp_path / "b" / one / "shard-00000.json").read_bytes())
    with pytest.raises(DamagedError, match="describes other shard files"):
        read_index(LocalStorage(storage.root + "/a"), read_manifest(LocalStorage(tmp_path / "a"), one), 0)


def test_a_renamed_checkpoint_can_be_read_by_its_new_name(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    id = write_checkpoint(tmp_path)
    rewrite_manifest(tmp_path / id, tokens=5)
    (tmp_path / id).rename(tmp_path / "mine")
    manifest = read_manifest(storage, "mine")
    assert (manifest.id, manifest.tokens) == (id, 5)
    assert read_index(storage, manifest, 0, name="mine").attempt == id
    with pytest.raises(NotFoundError):
        read_index(storage, manifest, 0)


def test_with_a_memory_only_what_is_new_or_has_changed_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    first, second = (write_checkpoint(storage, sequence=number) for number in (1, 2))
    read: list[str] = []
    real = LocalStorage.read_bytes

    def spied(self: LocalStorage, path: str, *, max_bytes: int) -> bytes:
        read.append(path)
        return real(self, path, max_bytes=max_bytes)

    monkeypatch.setattr(LocalStorage, "read_bytes", spied)
    memory: Memory = {}

    def newly_read() -> list[str]:
        read.clear()
        found = list_checkpoints(storage, memory)
        paths = sorted(read)
        assert found == list_checkpoints(storage), "as without a memory"
        return paths

    assert newly_read() == [f"{first}/{MANIFEST}", f"{second}/{MANIFEST}"]
    assert newly_read() == []
    marks.hold(storage, first)
    assert newly_read() == [f"{first}/{MANIFEST}"], "the mark is new"
    with open(tmp_path / second / "shard-00000.safetensors", "ab") as file:
        file.write(b"more")
    assert newly_read() == [f"{second}/{MANIFEST}"], "damaged by size"
    assert newly_read() == [f"{second}/{MANIFEST}"], "what is damaged is looked at again"
    shutil.rmtree(tmp_path / first)
    newly_read()
    assert first not in memory


def test_two_threads_may_share_a_memory(tmp_path: Path) -> None:
    """At the end of a run the mirror's own thread may still list while it is asked what is left."""

    class Shared(Memory):
        def keys(self) -> Any:
            return {"step-00000001-aaaaaaaa"}  # seen here, and removed by the other one right after

    write_checkpoint(LocalStorage(tmp_path), sequence=1)
    assert len(list_checkpoints(LocalStorage(tmp_path), Shared())) == 1
