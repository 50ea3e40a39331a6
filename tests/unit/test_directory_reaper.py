"""Deleting: the manifest before the data, abandoned attempts only when nobody can be writing them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.directory import marks
from engine.directory.listing import committed, list_checkpoints
from engine.directory.reaper import delete_attempt, reap, reap_abandoned
from engine.directory.retention import Decision, Retention, decide_retention
from engine.errors import LeaseLostError, StorageFullError, StorageUnavailableError
from engine.format.names import new_attempt
from engine.lease.lease import Lease
from engine.lease.process import ProcessIdentity
from engine.storage.base import Cleared, Storage
from engine.storage.local import LocalStorage
from tests.support.storages import RecordingStorage, StoreLike
from tests.support.tiny_checkpoint import write_checkpoint

GONE = replace(ProcessIdentity.current(), start_time=1)
"""Had the pid of this process before it."""
OTHER = ProcessIdentity(host="other", pid=1, start_time=1, boot_id="other", pid_namespace="other")


def write_many(root: Path, count: int) -> list[str]:
    return [write_checkpoint(root, sequence=n, rows=2) for n in range(1, count + 1)]


def written_by(run_id: str, root: Path, *, sequence: int, commit: bool = True) -> str:
    hex = new_attempt(sequence, run_id, str(sequence))[-8:]
    return write_checkpoint(root, sequence=sequence, rows=2, hex=hex, commit=commit)


def decide(storage: Storage, rolling: int) -> list[Decision]:
    return decide_retention(committed(list_checkpoints(storage)), Retention(rolling=rolling))


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


def take_lease(
    storage: Storage, now: list[float] | None = None, process: ProcessIdentity | None = None
) -> Lease:
    clock = now or [0.0]
    return Lease.acquire(storage, run_id="r", clock=lambda: clock[0], sleep=lambda _: None, process=process)


def test_the_manifest_goes_first_and_durably(tmp_path: Path) -> None:
    storage = RecordingStorage(tmp_path)
    one, two, three = write_many(tmp_path, 3)
    assert reap(storage, decide(storage, 2)).deleted == (one,)
    assert storage.calls == [
        f"publish {one}/tombstone",
        f"delete_file {one}/manifest.json",
        f"sync_dir {one}",
        f"clear_dir {one}",
        "sync_dir ",
    ]
    assert names(tmp_path) == {two, three}


def test_what_an_older_run_had_begun_to_delete_goes_at_once(tmp_path: Path) -> None:
    """Killed half-way, over a run's checkpoint that nobody remembers; an arriving copy has no tombstone."""
    one, two, three = write_many(tmp_path, 3)

    class Crash(BaseException):
        pass

    class Crashing(LocalStorage):
        def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
            raise Crash

    with pytest.raises(Crash):
        reap(Crashing(tmp_path), decide(LocalStorage(tmp_path), 2))
    arriving = tmp_path / "step-00000099-99999999"
    arriving.mkdir()
    (arriving / "shard-00000.safetensors").write_bytes(b"half of it")
    storage = LocalStorage(tmp_path)
    lease = take_lease(storage)
    assert reap_abandoned(storage, lease=lease).deleted == (one,)
    assert names(tmp_path) == {two, three, arriving.name}
    lease.release()


def test_a_full_disk_does_not_keep_a_checkpoint_from_being_deleted(tmp_path: Path) -> None:
    class Full(LocalStorage):
        def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
            raise StorageFullError("no space left")

    one, two, three = write_many(tmp_path, 3)
    assert reap(Full(tmp_path), decide(LocalStorage(tmp_path), 2)).deleted == (one,)
    assert names(tmp_path) == {two, three}


def test_what_was_removed_by_halves_on_a_full_disk_goes_with_the_next_round(tmp_path: Path) -> None:
    """It has no tombstone: who had begun to remove it remembers."""

    class FullAndBusy(LocalStorage):
        def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
            raise StorageFullError("no space left")

        def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
            raise StorageUnavailableError("busy")

    one, two, three = write_many(tmp_path, 3)
    storage = LocalStorage(tmp_path)
    lease = take_lease(storage)
    assert reap(FullAndBusy(tmp_path), decide(storage, 2), lease=lease).failed == ((one, "busy"),)
    assert reap_abandoned(storage, lease=lease).deleted == (one,)
    assert names(tmp_path) == {two, three}


def test_the_second_name_of_a_manifest_goes(tmp_path: Path) -> None:
    """Publishing leaves it where it is killed between giving the file its name and taking the old one."""
    storage = LocalStorage(tmp_path)
    whole = write_checkpoint(tmp_path, sequence=1)
    left, theirs = (
        tmp_path / whole / "manifest.json.0123abcd.tmp",
        tmp_path / whole / "manifest.json.mine.tmp",
    )
    left.touch()
    theirs.touch()
    assert reap_abandoned(storage, lease=take_lease(storage)).deleted == ()
    assert (left.exists(), theirs.exists()) == (False, True)


def test_a_crash_after_the_manifest_leaves_a_partial_one_that_is_cleared_later(tmp_path: Path) -> None:
    one, two, three = (written_by("r", tmp_path, sequence=n) for n in (1, 2, 3))

    class Crash(BaseException):
        pass

    class Crashing(LocalStorage):
        def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
            raise Crash

    storage = LocalStorage(tmp_path)
    take_lease(storage, process=GONE)
    with pytest.raises(Crash):
        reap(Crashing(tmp_path), decide(storage, 2))
    assert {item.id: item.status for item in list_checkpoints(storage)} == {
        one: "partial",
        two: "committed",
        three: "committed",
    }
    reap_abandoned(storage, lease=take_lease(storage))
    assert names(tmp_path) == {two, three}


def test_one_that_cannot_be_removed_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, *_ = write_many(tmp_path, 4)

    class Stubborn(LocalStorage):
        def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
            if path == one:
                raise StorageUnavailableError("busy")
            return super().clear_dir(path, ours)

    with caplog.at_level(logging.WARNING, "engine"):
        reaped = reap(Stubborn(tmp_path), decide(LocalStorage(tmp_path), 2))
    assert reaped.deleted == (two,)
    assert reaped.failed == ((one, "busy"),)
    assert one in caplog.text


def test_what_vanished_meanwhile_is_fine(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one, two, three = write_many(tmp_path, 3)
    decisions = decide(storage, 2)
    storage.delete_tree(one)
    assert reap(storage, decisions).failed == ()
    assert names(tmp_path) == {two, three}


def test_one_put_on_hold_since_the_decision_stays(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    one, *_ = write_many(tmp_path, 3)
    decisions = decide(storage, 2)
    marks.hold(storage, one)
    assert reap(storage, decisions).deleted == ()
    assert one in names(tmp_path)


def test_a_damaged_one_never_expires(tmp_path: Path) -> None:
    """It is evidence, and it does not count towards what is kept."""
    storage = LocalStorage(tmp_path)
    one, two, three = write_many(tmp_path, 3)
    marks.mark_damaged(storage, three, "bad block")
    reap(storage, decide(storage, 0))
    assert names(tmp_path) == {one, two, three}


def test_abandoned_attempts_go_but_not_what_is_being_written(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    whole = write_checkpoint(tmp_path, sequence=1)
    take_lease(storage, process=GONE)
    earlier = written_by("r", tmp_path, sequence=2, commit=False)
    lease = take_lease(storage)
    mine = write_checkpoint(tmp_path, sequence=3, commit=False)
    failed = write_checkpoint(tmp_path, sequence=4, commit=False)
    (tmp_path / "notes").mkdir()
    reaped = reap_abandoned(storage, lease=lease, current={mine}, failed_ids={failed})
    assert set(reaped.deleted) == {f"dead-{earlier}", failed}
    assert names(tmp_path) == {whole, mine, "notes"}


def test_only_the_holder_may_clear(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    lost = take_lease(storage, process=OTHER)
    storage.delete_file("lease-00000001")
    take_lease(storage)
    attempt = write_checkpoint(tmp_path, commit=False)
    with pytest.raises(LeaseLostError):
        reap_abandoned(storage, lease=lost)
    assert attempt in names(tmp_path)


def test_where_attempts_cannot_be_buried_they_stay_until_no_sleeper_can_commit(tmp_path: Path) -> None:
    storage, now = StoreLike(tmp_path), [0.0]
    take_lease(storage, process=GONE)
    attempt = written_by("r", tmp_path, sequence=1, commit=False)
    lease = take_lease(storage, now)
    now[0] = 59.9
    assert reap_abandoned(storage, lease=lease).deleted == ()
    now[0] = 60.0
    assert reap_abandoned(storage, lease=lease).deleted == (attempt,)


def test_an_attempt_committed_since_the_listing_stays(tmp_path: Path) -> None:
    attempt = write_checkpoint(tmp_path, commit=False)

    class CommitsMeanwhile(LocalStorage):
        def list_tree(self) -> dict[str, dict[str, int]]:
            tree = super().list_tree()
            (tmp_path / attempt / "manifest.json").write_bytes(b"{}")
            return tree

    (tmp_path / "elsewhere").mkdir()
    lease = take_lease(LocalStorage(tmp_path / "elsewhere"))
    storage = CommitsMeanwhile(tmp_path)
    assert reap_abandoned(storage, lease=lease, failed_ids={attempt}).deleted == ()
    assert attempt in names(tmp_path)
    assert (tmp_path / attempt / "shard-00000.safetensors").exists()


def test_a_failed_attempt_goes_unless_it_was_committed_after_all(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    failed = write_checkpoint(tmp_path, sequence=1, commit=False)
    whole = write_checkpoint(tmp_path, sequence=2)
    assert delete_attempt(storage, failed) is True
    assert delete_attempt(storage, whole) is False
    assert names(tmp_path) == {whole}


class WithUploads(StoreLike):
    """Knows of uploads that were begun and never ended: {path of the object}."""

    def __init__(self, root: Path, *uploads: str) -> None:
        super().__init__(root)
        self.uploads = set(uploads)

    def unfinished_uploads(self) -> list[str]:
        return sorted(self.uploads)

    def abort_uploads(self, path: str) -> None:
        self.uploads = {upload for upload in self.uploads if not upload.startswith(f"{path}/")}

    def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
        self.abort_uploads(path)
        return super().clear_dir(path, ours)


def test_uploads_that_have_no_end_are_found_and_removed(tmp_path: Path) -> None:
    """A process that is killed in the middle of an upload leaves parts that no listing shows."""
    take_lease(StoreLike(tmp_path), process=GONE)
    whole = written_by("r", tmp_path, sequence=1)
    partial = written_by("r", tmp_path, sequence=2, commit=False)
    running, unseen = new_attempt(30, "r", "3"), new_attempt(40, "r", "4")
    storage = WithUploads(tmp_path, *(f"{name}/shard" for name in (whole, partial, running, unseen, "notes")))
    now = [0.0]
    lease = take_lease(storage, now)
    reap_abandoned(storage, lease=lease, current=[running])
    assert f"{unseen}/shard" in storage.uploads  # another run may still be writing: the lease is too young
    now[0] = 1000.0
    assert reap_abandoned(storage, lease=lease, current=[running]).deleted == (partial, unseen)
    assert storage.uploads == {f"{running}/shard", "notes/shard"}
    assert names(tmp_path) == {whole}
