"""Copying one checkpoint: byte for byte, verified on arrival, continued after a break, mended."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.directory import marks
from engine.directory.listing import list_checkpoints, read_index, read_manifest
from engine.errors import (
    AlreadyExistsError,
    DamagedError,
    LeaseLostError,
    NotFoundError,
    StorageError,
    StorageUnavailableError,
)
from engine.format.names import DAMAGED, MANIFEST, lease_name
from engine.lease.lease import Lease
from engine.mirror import verified_source
from engine.mirror.copy_checkpoint import Cancelled, Copied, copy_checkpoint
from engine.storage import shard_writer, upload
from engine.storage.base import Storage, WriteStats
from engine.storage.local import LocalStorage
from tests.support.storages import StoreLike
from tests.support.tiers import KINDS, change_byte, second_storage, steps_in
from tests.support.tiny_checkpoint import write_checkpoint

SHARDS = ("shard-00000.safetensors", "shard-00001.safetensors")


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "local")


@pytest.fixture
def id(local: LocalStorage) -> str:
    """A checkpoint of two ranks; the first shard has several digest blocks, the second part of one more."""
    return write_checkpoint(local, world_size=2, rows=70, metrics={"val_loss": float("nan")})


@pytest.fixture(params=KINDS)
def second(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return second_storage(request.param, tmp_path)


def files(storage: Storage, id: str) -> dict[str, bytes]:
    names = [entry.name for entry in storage.list_dir(id)]
    return {name: storage.read_bytes(f"{id}/{name}", max_bytes=1 << 30) for name in names}


def sent(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the files that are written to the storage from now on."""
    counts: Counter[str] = Counter()
    for method in ("write_shard", "write_file", "publish"):
        real: Callable[..., Any] = getattr(storage, method)

        def count(path: str, *args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            counts[path.rpartition("/")[2]] += 1
            return real(path, *args, **kwargs)

        monkeypatch.setattr(storage, method, count)
    return counts


def test_a_copy_is_the_same_checkpoint(local: LocalStorage, second: Storage, id: str) -> None:
    copied = copy_checkpoint(local, id, second)
    assert files(second, id) == files(local, id)
    assert steps_in(second) == [10]
    here, there = (list_checkpoints(storage)[0].record for storage in (local, second))
    assert here is not None
    assert there is not None
    assert here.manifest_digest == there.manifest_digest
    assert (copied.id, copied.step, copied.path) == (id, 10, second.describe(id))
    assert copied.bytes == copied.sent_bytes == here.bytes


def test_and_back_again_from_a_store(tmp_path: Path, second: Storage, local: LocalStorage, id: str) -> None:
    copy_checkpoint(local, id, second)
    home = LocalStorage(tmp_path / "home")
    copy_checkpoint(second, id, home)
    assert files(home, id) == files(local, id)


@pytest.mark.parametrize("source_kind", ["directory", "store"])
@pytest.mark.parametrize("window_bytes", [3 * 65536, 2 * 65536 + 4096])
def test_files_too_large_for_memory_go_window_by_window(
    source_kind: str, window_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by windows that cut digest blocks in two."""
    monkeypatch.setattr(shard_writer, "WINDOW_BYTES", window_bytes)
    monkeypatch.setattr(verified_source, "STORE_READ_BYTES", 2 * window_bytes)
    kind = LocalStorage if source_kind == "directory" else StoreLike
    source = kind(tmp_path / "local")
    id = write_checkpoint(source, world_size=2, rows=900)
    target = LocalStorage(tmp_path / "mirror")
    seen: list[int] = []
    copied = copy_checkpoint(source, id, target, progress=seen.append)
    assert files(target, id) == files(source, id)
    assert sum(seen) == pytest.approx(2 * copied.bytes, rel=0.01)
    assert not [path for path in (tmp_path / "mirror").iterdir() if path.name != id], (
        "no scratch file is left"
    )


def test_order_manifest_last(
    local: LocalStorage, second: Storage, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = sent(second, monkeypatch)
    copy_checkpoint(local, id, second)
    assert list(counts)[-1] == MANIFEST
    assert set(counts.values()) == {1}


def test_what_is_there_whole_is_not_sent_again(
    local: LocalStorage, second: Storage, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_checkpoint(local, id, second)
    counts = sent(second, monkeypatch)
    for check in (False, True):
        assert copy_checkpoint(local, id, second, check=check).sent_bytes == 0
    assert counts == {}


def test_a_copy_that_was_broken_off_goes_on(
    local: LocalStorage, second: Storage, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = RuntimeError("the power is gone")

    def breaks(path: str, *args: Any, **kwargs: Any) -> None:
        if path.endswith("shard-00001.json"):
            raise broken
        real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        real = second.write_file
        patch.setattr(second, "write_file", breaks)
        with pytest.raises(RuntimeError, match="power"):
            copy_checkpoint(local, id, second)
    assert [item.status for item in list_checkpoints(second)] == ["partial"]
    counts = sent(second, monkeypatch)
    copied = copy_checkpoint(local, id, second)
    assert counts == {"shard-00001.json": 1, MANIFEST: 1}
    assert copied.sent_bytes == local.size(f"{id}/shard-00001.json")
    assert steps_in(second) == [10]


@pytest.mark.parametrize("spoil", ["changed", "shorter", "gone", "index", "stray"])
@pytest.mark.parametrize("committed", [True, False])
def test_what_is_there_and_not_whole_is_sent_again(
    spoil: str,
    committed: bool,
    local: LocalStorage,
    second: Storage,
    id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy_checkpoint(local, id, second)
    if not committed:
        second.delete_file(f"{id}/{MANIFEST}")
    hurt = {"index": "shard-00001.json", "stray": "shard-00002.safetensors"}.get(spoil, SHARDS[0])
    if spoil in ("changed", "index"):
        change_byte(second, f"{id}/{hurt}", at=5000 if spoil == "changed" else 20)
    elif spoil == "shorter":
        second.write_file(f"{id}/{hurt}", b"short")
    elif spoil == "gone":
        second.delete_file(f"{id}/{hurt}")
    else:
        second.write_file(f"{id}/{hurt}", b"nobody's")
    counts = sent(second, monkeypatch)
    copy_checkpoint(local, id, second, check=True)
    assert {name for name in counts if name.startswith("shard")} == ({hurt} - {"shard-00002.safetensors"})
    assert files(second, id) == files(local, id)
    assert steps_in(second) == [10]


def test_while_it_is_mended_it_is_listed_as_damaged(
    local: LocalStorage, second: Storage, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_checkpoint(local, id, second)
    change_byte(second, f"{id}/{SHARDS[1]}")
    statuses = []

    def look(*args: Any, **kwargs: Any) -> WriteStats:
        statuses.append(list_checkpoints(second)[0].status)
        raise StorageUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(second, "write_shard", look)
        with pytest.raises(StorageUnavailableError):
            copy_checkpoint(local, id, second, check=True)
    assert statuses == ["damaged"]
    assert [item.status for item in list_checkpoints(second)] == ["damaged"]
    copy_checkpoint(local, id, second)
    assert steps_in(second) == [10]


def test_with_one_of_two_changed_files_mended_it_is_still_listed_as_damaged(
    local: LocalStorage, second: Storage, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every size is right then: only the mark tells."""
    copy_checkpoint(local, id, second)
    for shard in SHARDS:
        change_byte(second, f"{id}/{shard}")
    statuses = []
    real = second.open_reader

    def look(path: str) -> Any:
        if path.endswith(SHARDS[1]):
            statuses.append(list_checkpoints(second)[0].status)
        return real(path)

    monkeypatch.setattr(second, "open_reader", look)
    copy_checkpoint(local, id, second, check=True)
    assert statuses == ["damaged", "damaged"]
    monkeypatch.undo()
    assert steps_in(second) == [10]


def test_a_wrong_mark_is_taken_back(local: LocalStorage, second: Storage, id: str) -> None:
    copy_checkpoint(local, id, second)
    marks.mark_damaged(second, id, "block 3 is bad")
    assert copy_checkpoint(local, id, second).sent_bytes == 0
    assert steps_in(second) == [10]
    assert DAMAGED not in files(second, id)


def test_a_damaged_manifest_is_replaced(local: LocalStorage, second: Storage, id: str) -> None:
    copy_checkpoint(local, id, second)
    change_byte(second, f"{id}/{MANIFEST}", at=40)
    assert [item.status for item in list_checkpoints(second)] == ["damaged"]
    copy_checkpoint(local, id, second)
    assert steps_in(second) == [10]


def test_another_checkpoint_of_that_name_is_left_alone(tmp_path: Path, second: Storage, id: str) -> None:
    write_checkpoint(second, world_size=2, rows=70, seed=1)
    before = files(second, id)
    with pytest.raises(AlreadyExistsError, match="a different checkpoint with the same name"):
        copy_checkpoint(LocalStorage(tmp_path / "local"), id, second, check=True)
    assert files(second, id) == before


def test_damage_at_the_source_is_never_copied(
    local: LocalStorage, second: Storage, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_byte(local, f"{id}/{SHARDS[0]}", at=66_000)
    with pytest.raises(DamagedError, match=r"shard-00000\.safetensors: block 1 "):
        copy_checkpoint(local, id, second)
    assert steps_in(second) == []
    assert not second.exists(f"{id}/{SHARDS[0]}")
    for writer in (shard_writer, upload):  # also where other windows have gone out before
        monkeypatch.setattr(writer, "WINDOW_BYTES", 4096)
    with pytest.raises(DamagedError, match=r"shard-00000\.safetensors: block 1 "):
        copy_checkpoint(local, id, second)
    assert steps_in(second) == []
    assert not second.exists(f"{id}/{SHARDS[0]}")


def test_a_verified_file_can_be_sent_again_from_its_beginning(local: LocalStorage, id: str) -> None:
    """Its blocks are compared anew, also after a send that was broken off in the middle of one."""
    (file,) = read_index(local, read_manifest(local, id), 0, name=id).files
    with verified_source.verified(local, f"{id}/{file.file}", file, lambda count: None) as source:
        next(source.windows(100_000))
        assert sum(window.end - window.begin for window in source.windows(100_000)) == file.file_bytes


def test_a_source_that_was_never_committed(local: LocalStorage, second: Storage) -> None:
    attempt = write_checkpoint(local, commit=False)
    with pytest.raises(NotFoundError):
        copy_checkpoint(local, attempt, second)


class Changing(LocalStorage):
    """Stores other bytes than it was given, as often as it is told to."""

    def __init__(self, root: Path, times: int) -> None:
        super().__init__(root)
        self.times = times

    def write_shard(self, path: str, *args: Any, **kwargs: Any) -> WriteStats:
        stats = super().write_shard(path, *args, **kwargs)
        if self.times > 0:
            self.times -= 1
            change_byte(self, path, at=4321)
        return stats


def test_what_arrives_changed_is_sent_again(tmp_path: Path, local: LocalStorage, id: str) -> None:
    target = Changing(tmp_path / "mirror", times=2)
    copied = copy_checkpoint(local, id, target)
    assert steps_in(target) == [10]
    assert copied.sent_bytes > copied.bytes


def test_a_store_that_keeps_changing_data_is_named_and_nothing_is_committed(
    tmp_path: Path, local: LocalStorage, id: str
) -> None:
    target = Changing(tmp_path / "mirror", times=99)
    with pytest.raises(StorageError, match=r"was sent 3 times, and changed on the way.*selftest"):
        copy_checkpoint(local, id, target)
    assert steps_in(target) == []


def test_a_copy_that_is_cancelled_keeps_what_has_arrived(
    local: LocalStorage, second: Storage, id: str
) -> None:
    cancel = threading.Event()
    told: list[int] = []

    def progress(count: int) -> None:
        told.append(count)
        if len(told) == 3:
            cancel.set()

    with pytest.raises(Cancelled):
        copy_checkpoint(local, id, second, progress=progress, cancel=cancel)
    assert steps_in(second) == []
    assert SHARDS[0] in files(second, id)
    copied: Copied = copy_checkpoint(local, id, second)
    assert 0 < copied.sent_bytes < copied.bytes


def test_without_the_lease_nothing_is_committed(local: LocalStorage, second: Storage, id: str) -> None:
    second.make_dir()
    lease = Lease.acquire(second, run_id="first")
    second.write_file(lease_name(lease.epoch + 1), b"{}")
    with pytest.raises(LeaseLostError):
        copy_checkpoint(local, id, second, lease=lease)
    assert steps_in(second) == []


def test_an_attempt_that_was_put_aside_is_continued(
    tmp_path: Path, local: LocalStorage, id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = LocalStorage(tmp_path / "mirror")
    copy_checkpoint(local, id, target)
    target.delete_file(f"{id}/{MANIFEST}")
    target.rename(id, f"dead-{id}")
    assert [item.id for item in list_checkpoints(target)] == [f"dead-{id}"]
    assert copy_checkpoint(local, id, target).sent_bytes == 0
    assert steps_in(target) == [10]


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of 144 MB, no more than a few windows are this process's own at any time."""
    source, target = LocalStorage(tmp_path / "local"), LocalStorage(tmp_path / "mirror")
    id = write_checkpoint(source, rows=36_000)

    def resident_bytes() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))

    before, highest = resident_bytes(), 0

    def progress(count: int) -> None:
        nonlocal highest
        highest = max(highest, resident_bytes())

    copied = copy_checkpoint(source, id, target, progress=progress)
    assert copied.bytes > 140e6
    # Two windows of 16 MiB that are being written, one that is read, and what reads and writes them.
    assert highest - before < 64 << 20
