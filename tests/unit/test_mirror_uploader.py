"""The mirror of a run: a round, an outage, the end, and what the next start makes of it."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.directory import marks
from engine.directory.clean_up import delete_expired
from engine.directory.listing import committed, list_checkpoints
from engine.directory.retention import Retention
from engine.errors import DirectoryHeldError, StorageDeniedError, StorageUnavailableError
from engine.format.names import MANIFEST, lease_name
from engine.lease.lease import Lease
from engine.mirror import uploader
from engine.mirror.uploader import Mirror, at_most, no_limit
from engine.save.run_directory import close_mirror
from engine.storage.base import Heads, Storage
from engine.storage.local import LocalStorage
from engine.storage.source import Source
from tests.support.controlled import DEADLINE_SECS
from tests.support.tiers import KINDS, Desk, change_byte, second_storage, steps_in
from tests.support.tiny_checkpoint import write_checkpoint

KEEP_2 = Retention(rolling=2)


@pytest.fixture(autouse=True)
def opened_mirrors_are_released(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mirror that a test opens and leaves keeps a lease, whose thread would outlive the test."""
    opened: list[Mirror] = []
    real = Mirror.open

    def noted(self: Mirror, *args: Any, **kwargs: Any) -> None:
        opened.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Mirror, "open", noted)
    yield
    for mirror in opened:
        mirror.try_release()


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "local")


@pytest.fixture(params=KINDS)
def second(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return second_storage(request.param, tmp_path)


def save(local: Storage, *sequences: int, **more: Any) -> list[str]:
    return [write_checkpoint(local, sequence=sequence, rows=4, **more) for sequence in sequences]


class Outage:
    """Every call that changes the storage fails, while it lasts."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = StorageUnavailableError("503 Slow Down")
        for method in ("write_shard", "write_file", "publish", "list_tree"):
            monkeypatch.setattr(storage, method, self._through(getattr(storage, method)))

    def _through(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.error is not None:
                raise self.error
            return real(*args, **kwargs)

        return call


def test_a_round_brings_everything_newest_first(local: LocalStorage, second: Storage) -> None:
    save(local, 1, 2, 3)
    desk = Desk(local, second).once()
    assert steps_in(second) == [10, 20, 30]
    assert desk.kinds() == [("mirror_copied", 30), ("mirror_copied", 20), ("mirror_copied", 10)]
    assert [event["owed"] for event in desk.events] == [2, 1, 0]
    first = desk.events[0]
    assert first["path"].startswith(second.uri)
    assert first["bytes"] == first["sent_bytes"] > 0
    assert Desk(local, second).once().events == [], "a second round has nothing to do"


def test_the_policy_holds_for_the_mirror_by_itself(local: LocalStorage, second: Storage) -> None:
    save(local, 1, metrics={"val_loss": 0.5})
    save(local, 2, epoch=1, reasons=("epoch",))
    save(local, 3, 4, 5)
    desk = Desk(local, second, retention=KEEP_2).once()
    assert steps_in(second) == [10, 20, 40, 50]
    assert 30 not in [step for _, step in desk.kinds()], "it would have gone at once"
    # Locally they are gone; the mirror keeps what its own policy keeps.
    for item in committed(list_checkpoints(local)):
        if item.step <= 20:
            local.delete_tree(item.id)
    save(local, 6)
    Desk(local, second, retention=KEEP_2).once()
    assert steps_in(second) == [10, 20, 50, 60]


def test_a_held_copy_stays_in_the_mirror(local: LocalStorage, second: Storage) -> None:
    (first,) = save(local, 1)
    Desk(local, second, retention=KEEP_2).once()
    marks.hold(second, first)
    save(local, 2, 3, 4)
    Desk(local, second, retention=KEEP_2).once()
    assert steps_in(second) == [10, 30, 40]


def test_mirror_freq_thins_out_interval_saves_only(local: LocalStorage, second: Storage) -> None:
    save(local, 1, 2, 3)
    save(local, 5, reasons=("interval", "best"))
    Desk(local, second, freq=20).once()
    assert steps_in(second) == [20, 50]


@pytest.mark.usefixtures("nothing_arrives")
def test_what_was_half_sent_is_continued_and_what_is_no_longer_pending_is_deleted(
    local: LocalStorage, second: Storage
) -> None:
    one, two = save(local, 1, 2)
    Desk(local, second).once()
    for id in (one, two):
        second.delete_file(f"{id}/{MANIFEST}")
    local.delete_tree(one)
    if second.is_local:  # elsewhere it is left alone until nobody can still be writing it
        desk = Desk(local, second).once()
        assert [event["sent_bytes"] for event in desk.events] == [0]
        assert [item.id for item in list_checkpoints(second)] == [two]
    else:
        Desk(local, second).once()
        assert steps_in(second) == [20]


def test_a_copy_that_changed_is_found_and_mended_at_the_next_start(
    local: LocalStorage, second: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = save(local, 1, 2)
    Desk(local, second).once()
    change_byte(second, f"{one}/shard-00000.safetensors", at=5000)
    desk = Desk(local, second)
    desk.mirror.open()
    desk.mirror.catch_up()
    desk.mirror.recheck_earlier_copies()
    assert desk.kinds() == [("mirror_copied", 10)]
    assert 0 < desk.events[0]["sent_bytes"] < desk.events[0]["bytes"]
    assert steps_in(second) == [10, 20]
    assert f"{one} is damaged: sending it again" in caplog.text
    # Once in a run is enough.
    change_byte(second, f"{two}/shard-00000.safetensors", at=5000)
    desk.mirror.recheck_earlier_copies()
    assert len(desk.events) == 1


def test_a_copy_whose_size_changed_is_pending_again(local: LocalStorage, second: Storage) -> None:
    (one,) = save(local, 1)
    Desk(local, second).once()
    second.write_file(f"{one}/shard-00000.safetensors", b"short")
    Desk(local, second).once()
    assert steps_in(second) == [10]


def test_looking_after_gives_way_to_a_commit(local: LocalStorage, second: Storage) -> None:
    save(local, 1)
    Desk(local, second).once()
    desk = Desk(local, second)
    desk.mirror.open()
    desk.mirror.committed()
    (path,) = [item.id for item in list_checkpoints(second)]
    change_byte(second, f"{path}/shard-00000.safetensors")
    desk.mirror.recheck_earlier_copies()
    assert desk.events == []


def test_a_damaged_local_one_is_marked_told_and_does_not_hold_up_the_others(
    local: LocalStorage, second: Storage
) -> None:
    one, two = save(local, 1, 2)
    change_byte(local, f"{two}/shard-00000.safetensors")
    desk = Desk(local, second).once()
    assert steps_in(second) == [10]
    assert desk.kinds() == [("mirror_failed", 20), ("mirror_copied", 10)]
    assert "shard-00000.safetensors: block" in desk.events[0]["cause"]
    assert {item.id: item.status for item in list_checkpoints(local)} == {one: "committed", two: "damaged"}


def test_another_checkpoint_of_that_name_does_not_hold_up_the_others(
    local: LocalStorage, second: Storage
) -> None:
    save(local, 1, 2)
    write_checkpoint(second, sequence=2, rows=4, seed=7)
    (there,) = [item.id for item in list_checkpoints(second)]
    second.write_file(f"{there}/shard-00000.safetensors", b"short")
    desk = Desk(local, second).once()
    assert desk.kinds() == [("mirror_failed", 20), ("mirror_copied", 10)]
    assert "a different checkpoint with the same name" in desk.events[0]["cause"]


def test_one_that_retention_removed_meanwhile_is_no_failure(
    local: LocalStorage, second: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = save(local, 1, 2)[1]
    desk = Desk(local, second)
    real = local.open_reader

    def retired(path: str) -> Any:
        if path.startswith(two):
            local.delete_file(f"{two}/{MANIFEST}")
            local.delete_tree(two)
        return real(path)

    monkeypatch.setattr(local, "open_reader", retired)
    desk.once()
    assert desk.kinds() == [("mirror_copied", 10)]


def test_commit_numbers_go_on_above_the_mirrors(local: LocalStorage, second: Storage) -> None:
    write_checkpoint(second, sequence=41, rows=4)
    local.make_dir()
    desk = Desk(local, second)
    desk.mirror.open()
    assert desk.mirror.highest_sequence == 41


def test_a_mirror_that_another_run_writes_to_is_refused(local: LocalStorage, second: Storage) -> None:
    second.make_dir()
    with Lease.acquire(second, run_id="other"), pytest.raises(DirectoryHeldError):
        Desk(local, second).mirror.open()


def test_a_mirror_that_does_not_answer_at_the_start(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(local, 1)
    second = LocalStorage(tmp_path / "mirror")
    outage = Outage(second, monkeypatch)
    desk = Desk(local, second)
    with pytest.raises(StorageUnavailableError):
        desk.mirror.open()
    desk.mirror.open(required=False)
    assert desk.mirror.pending_ids(committed(list_checkpoints(local))), "everything, as far as is known"
    outage.error = None
    desk.mirror.catch_up()
    desk.mirror.try_release()
    assert steps_in(second) == [10]
    outage.error = StorageDeniedError("403")
    with pytest.raises(StorageDeniedError):
        Desk(local, second).mirror.open(required=False)


def free_at_once(storage: Storage) -> bool:
    """Whether the next run gets the lease without waiting for a dead holder."""
    try:
        Lease.acquire(storage, run_id="next", sleep=lambda secs: pytest.fail("it is held")).release()
    except DirectoryHeldError:
        return False
    return True


@pytest.mark.parametrize("error", [StorageUnavailableError("503"), StorageDeniedError("403")], ids=repr)
def test_a_start_that_fails_lets_go_of_the_mirror(
    error: Exception, local: LocalStorage, second: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is taken by then; the next start must not be told that somebody holds the mirror."""
    second.make_dir()

    def refuses(storage: Storage, **given: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(uploader, "list_checkpoints", refuses)
        with pytest.raises(type(error)):
            Desk(local, second).mirror.open()
    assert free_at_once(second)


def test_opening_the_mirror_lists_it_once(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing of the takeover is used once: a round has one of its own."""
    second = LocalStorage(tmp_path / "second")
    listings: list[str] = []
    list_heads = LocalStorage.list_heads

    def counting(storage: LocalStorage) -> Heads:
        listings.append(storage.uri)
        return list_heads(storage)

    monkeypatch.setattr(LocalStorage, "list_heads", counting)
    mirror = Desk(local, second).mirror
    mirror.open()
    assert listings.count(second.uri) == 1
    listings.clear()
    mirror.catch_up()
    assert listings.count(second.uri) == 2, "to see what is there, and for what was abandoned"
    mirror.close()


def test_a_mirror_that_never_began_lets_go_when_it_is_closed(local: LocalStorage, second: Storage) -> None:
    mirror = Desk(local, second).mirror
    mirror.open()
    assert not free_at_once(second)
    assert mirror.close()
    assert free_at_once(second)


def test_a_mirror_whose_lease_was_lost_goes_on_once_it_is_free(local: LocalStorage, second: Storage) -> None:
    save(local, 1)
    desk = Desk(local, second)
    desk.mirror.open()
    other = Lease.acquire(second, run_id="other", sleep=lambda secs: None, alive=lambda process: False)
    assert not desk.mirror._try(desk.mirror.catch_up)
    assert "another run has taken" in desk.events[0]["cause"]
    assert steps_in(second) == []
    other.release()
    assert desk.mirror._try(desk.mirror.catch_up)
    assert steps_in(second) == [10]


class Running:
    """A mirror with its thread; `told` is released at every event."""

    def __init__(self, local: Storage, second: Storage) -> None:
        self.desk = Desk(local, second)
        self.told = threading.Semaphore(0)
        self.desk.mirror._on_event = self._take
        self.desk.mirror.open(required=False)
        self.mirror = self.desk.mirror

    def _take(self, event: dict[str, Any]) -> None:
        self.desk.events.append(event)
        self.told.release()

    def wait_for_an_event(self) -> dict[str, Any]:
        assert self.told.acquire(timeout=DEADLINE_SECS)
        return self.desk.events[-1]


def test_the_thread_follows_every_commit_and_the_end_waits_for_it(
    local: LocalStorage, second: Storage
) -> None:
    save(local, 1)
    running = Running(local, second)
    running.mirror.start()
    assert running.wait_for_an_event()["step"] == 10
    save(local, 2)
    running.mirror.committed()
    assert running.wait_for_an_event()["step"] == 20
    save(local, 3)
    assert running.mirror.close()
    assert steps_in(second) == [10, 20, 30]
    Lease.acquire(
        second, run_id="next", sleep=lambda secs: pytest.fail("the lease was not released")
    ).release()


def test_an_outage_is_told_once_and_ends_with_the_next_commit(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    second = LocalStorage(tmp_path / "mirror")
    running = Running(local, second)
    outage = Outage(second, monkeypatch)
    rounds = threading.Semaphore(0)
    real = running.mirror.catch_up

    def catch_up() -> None:
        try:
            real()
        finally:
            rounds.release()

    monkeypatch.setattr(running.mirror, "catch_up", catch_up)
    with caplog.at_level(logging.INFO, "engine.mirror"):
        running.mirror.start()
        for sequence in (1, 2, 3):
            save(local, sequence)
            running.mirror.committed()
            assert rounds.acquire(timeout=DEADLINE_SECS)
        outage.error = None
        save(local, 4)
        running.mirror.committed()
        assert running.mirror.close()
    assert steps_in(second) == [10, 20, 30, 40]
    assert [kind for kind, _ in running.desk.kinds()].count("mirror_failed") == 1
    (failed,) = [event for event in running.desk.events if event["event"] == "mirror_failed"]
    assert failed["cause"] == "503 Slow Down"
    assert failed["path"] == second.uri
    assert caplog.text.count("503 Slow Down") == 1
    assert "works again" in caplog.text


def test_an_outage_is_tried_again_without_a_commit(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "RETRY_SECS", 0.0)
    second = LocalStorage(tmp_path / "mirror")
    save(local, 1)
    running = Running(local, second)
    outage = Outage(second, monkeypatch)
    running.mirror.start()
    assert running.wait_for_an_event()["event"] == "mirror_failed"
    outage.error = None
    assert running.wait_for_an_event()["event"] == "mirror_copied"
    running.mirror.close()


def test_an_outage_at_the_end_leaves_the_rest_to_the_next_start(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    second = LocalStorage(tmp_path / "mirror")
    save(local, 1, 2)
    running = Running(local, second)
    outage = Outage(second, monkeypatch)
    running.mirror.start()
    assert running.mirror.close()
    assert "2 checkpoints are not yet copied to the mirror" in caplog.text
    outage.error = None
    second.delete_file(lease_name(1))
    Desk(local, second).once()
    assert steps_in(second) == [10, 20]


class Held(LocalStorage):
    """Each shard waits in the middle of being written, until it is let go; it hears of the end."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.inside, self.go = threading.Event(), threading.Event()

    def write_shard(self, path: str, source: Source) -> Any:
        self.inside.set()
        assert self.go.wait(DEADLINE_SECS)
        return super().write_shard(path, source)


def test_when_the_time_is_up_the_copy_is_broken_off(
    local: LocalStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second = Held(tmp_path / "mirror")
    save(local, 1, 2)
    running = Running(local, second)
    running.mirror.start()
    assert second.inside.wait(DEADLINE_SECS)
    save(local, 3)
    asked = []

    def patience() -> float:
        asked.append(len(asked))
        second.go.set() if len(asked) > 2 else None
        return 0.0 if len(asked) > 2 else 0.01

    assert running.mirror.close(patience)
    there = steps_in(second)
    assert len(there) < 3
    assert re.search(rf"{3 - len(there)} checkpoints? (is|are) not yet copied to the mirror", caplog.text)
    assert not running.desk.mirror.thread or not running.desk.mirror.thread.is_alive()
    Desk(local, second).once()
    assert steps_in(second) == [10, 20, 30]


def test_a_storage_that_hangs_holds_nobody_up(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "CANCEL_SECS", 0.0)
    second = Held(tmp_path / "mirror")
    save(local, 1)
    running = Running(local, second)
    running.mirror.start()
    assert second.inside.wait(DEADLINE_SECS)
    try:
        assert not running.mirror.close(at_most(0.0))
        assert uploader.copies_hang()
    finally:
        second.go.set()
    assert running.mirror.thread is not None
    running.mirror.thread.join(DEADLINE_SECS)
    assert not uploader.copies_hang()


def test_after_the_lease_was_lost_nothing_is_written_until_it_is_free_again(
    local: LocalStorage, tmp_path: Path
) -> None:
    second = LocalStorage(tmp_path / "mirror")
    save(local, 1)
    running = Running(local, second)
    other = lease_name(running.mirror._require_lease().epoch + 1)
    second.write_file(other, b"{}")
    running.mirror.start()
    failed = running.wait_for_an_event()
    assert failed["event"] == "mirror_failed"
    assert "another run has taken" in failed["cause"]
    assert running.mirror.close(at_most(0.0))
    assert steps_in(second) == []


def lease_of(local: Storage) -> Lease:
    local.make_dir()
    return Lease.acquire(local, run_id="run")


def test_the_local_retention_keeps_what_is_pending(local: LocalStorage, second: Storage) -> None:
    save(local, 1, 2, 3, 4, 5)
    mirror = Desk(local, second, retention=KEEP_2).mirror
    lease = lease_of(local)
    assert not delete_expired(local, lease, KEEP_2, mirror)
    assert steps_in(local) == [10, 20, 30, 40, 50]
    mirror.open()
    mirror.catch_up()
    assert delete_expired(local, lease, KEEP_2, mirror)
    assert steps_in(local) == [40, 50]


def test_on_a_full_disk_pending_ones_are_deleted_one_at_a_time_with_a_warning(
    local: LocalStorage, second: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    save(local, 1, 2, 3, 4, 5)
    mirror = Desk(local, second, retention=KEEP_2).mirror
    lease = lease_of(local)
    assert delete_expired(local, lease, KEEP_2, mirror, disk_full=True)
    assert steps_in(local) == [10, 30, 40, 50]
    assert "step-00000020-00000002 before it was copied to the mirror: the disk is full" in caplog.text
    assert delete_expired(local, lease, KEEP_2, mirror, disk_full=True)
    assert steps_in(local) == [10, 40, 50]
    assert not delete_expired(local, lease, KEEP_2, mirror, disk_full=True), "the oldest one stays"
    assert steps_in(local) == [10, 40, 50]


def test_on_a_full_disk_expired_ones_are_deleted_before_pending_ones(
    local: LocalStorage, second: Storage
) -> None:
    save(local, 1, 2, 3, 4, 5)
    mirror = Desk(local, second, freq=40, retention=KEEP_2).mirror
    assert delete_expired(local, lease_of(local), KEEP_2, mirror, disk_full=True)
    assert steps_in(local) == [40, 50]


def test_a_clean_up_that_fails_after_the_mirror_was_closed_is_the_next_runs(
    local: LocalStorage, second: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(local, 1)
    mirror = Desk(local, second).mirror
    mirror.open()

    def refuses(*_: Any, **__: Any) -> bool:
        raise StorageUnavailableError("the mount is gone")

    monkeypatch.setattr("engine.save.run_directory.delete_expired", refuses)
    close_mirror(mirror, no_limit, local, lease_of(local), KEEP_2)
    assert "the mount is gone" in caplog.text
    assert free_at_once(second)
