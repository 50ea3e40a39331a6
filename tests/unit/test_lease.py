"""The lease: one writer at a time, decided without sleeping on injected clocks."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from engine.errors import (
    ConfigError,
    DamagedError,
    DirectoryHeldError,
    LeaseLostError,
    NotFoundError,
    StorageUnavailableError,
)
from engine.format.names import lease_name, new_attempt
from engine.lease.lease import Lease
from engine.lease.lease_file import LeaseInfo, Verdict, judge
from engine.lease.process import ProcessIdentity, is_alive
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from tests.support.storages import LastWriterWins, RecordingStorage, StoreLike

HERE = ProcessIdentity(host="here", pid=100, start_time=1, boot_id="boot-a", pid_namespace="pid:[1]")
NEIGHBOUR = replace(HERE, pid=200)
CONTAINER = replace(HERE, pid=1, pid_namespace="pid:[2]")
FAR = replace(HERE, host="far", pid=300, boot_id="boot-b")

ATTEMPT = new_attempt(1, "me", "its first")
COMMITTED = "step-00000002-0000000b"


@dataclass
class World:
    """A clock that only sleeping moves, and what else happens while somebody sleeps."""

    now: float = 1000.0
    living: set[int] = field(default_factory=set)
    meanwhile: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.now += secs
        self.meanwhile()

    def alive(self, process: ProcessIdentity) -> bool | None:
        return process.pid in self.living

    def acquire(
        self, storage: Storage, process: ProcessIdentity = HERE, run_id: str = "me", **given: object
    ) -> Lease:
        return Lease.acquire(
            storage,
            run_id=run_id,
            clock=self.clock,
            sleep=self.sleep,
            process=process,
            wall=lambda: self.now + 5e8,
            **{"alive": self.alive, **given},
        )


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def storage(tmp_path: Path) -> RecordingStorage:
    return RecordingStorage(tmp_path)


def leases(storage: LocalStorage) -> list[str]:
    return sorted(entry.name for entry in storage.list_dir() if entry.name.startswith("lease-"))


@pytest.mark.parametrize(
    ("holder", "released", "alive", "unchanged_secs", "has_changed", "verdict"),
    [
        (NEIGHBOUR, True, True, 0, False, Verdict.FREE),
        (FAR, True, None, 0, True, Verdict.FREE),
        (NEIGHBOUR, False, True, 999, False, Verdict.LIVE),  # a stopped process still has its open files
        (NEIGHBOUR, False, False, 0, True, Verdict.FREE),
        (NEIGHBOUR, False, None, 59, False, Verdict.UNKNOWN),  # /proc would not say
        (NEIGHBOUR, False, None, 60, False, Verdict.FREE),
        (CONTAINER, False, False, 0, False, Verdict.UNKNOWN),  # its pid means nothing here
        (FAR, False, False, 59.9, False, Verdict.UNKNOWN),
        (FAR, False, False, 60, False, Verdict.FREE),
        (FAR, False, False, 3, True, Verdict.LIVE),
    ],
)
def test_judging_a_holder(
    holder: ProcessIdentity,
    released: bool,
    alive: bool | None,
    unchanged_secs: float,
    has_changed: bool,
    verdict: Verdict,
) -> None:
    top = LeaseInfo(1, holder, "run", heartbeat=3, heartbeat_at=0.0, released=released)
    assert judge(top, HERE, lambda _: alive, unchanged_secs, has_changed, 60) is verdict


def test_a_fresh_directory_is_free(world: World, storage: RecordingStorage) -> None:
    lease = world.acquire(storage)
    assert lease.epoch == 1
    assert leases(storage) == ["lease-00000001"]
    lease.check()
    world.now += 7
    assert lease.held_secs == 7


def test_a_live_holder_on_this_machine_is_refused_at_once(world: World, storage: RecordingStorage) -> None:
    world.acquire(storage, NEIGHBOUR, "theirs")
    world.living.add(NEIGHBOUR.pid)
    world.now += 4
    with pytest.raises(DirectoryHeldError) as raised:
        world.acquire(storage)
    message = str(raised.value)
    assert f"{storage.uri} is held by run theirs, process 200 on here, last heartbeat 4 s ago" in message
    assert "another --checkpoint_dir, or stop that process" in message
    assert world.now == 1004, "nothing to wait for"


def test_a_dead_holder_on_this_machine_is_taken_over_at_once(world: World, storage: RecordingStorage) -> None:
    world.acquire(storage, NEIGHBOUR)
    lease = world.acquire(storage)
    assert (lease.epoch, world.now) == (2, 1000)
    assert leases(storage) == ["lease-00000002"], "the older lease is removed"


def test_a_released_lease_is_free_at_once_and_epochs_go_on(world: World, storage: RecordingStorage) -> None:
    world.living.add(NEIGHBOUR.pid)
    with world.acquire(storage, NEIGHBOUR):
        pass
    assert world.acquire(storage).epoch == 2


def test_the_same_process_twice_is_told_so(world: World, storage: RecordingStorage) -> None:
    world.living.add(HERE.pid)
    world.acquire(storage)
    with pytest.raises(DirectoryHeldError, match="this process itself"):
        world.acquire(storage)


def test_a_holder_elsewhere_is_watched_for_a_minute(world: World, storage: RecordingStorage) -> None:
    world.acquire(storage, FAR)
    assert world.acquire(storage).epoch == 2
    assert world.now == 1060


def test_a_holder_elsewhere_that_beats_is_refused(world: World, storage: RecordingStorage) -> None:
    theirs = world.acquire(storage, FAR, "theirs")
    world.meanwhile = lambda: theirs.heartbeat() if world.now >= 1059 else None
    with pytest.raises(DirectoryHeldError, match=r"run theirs, process 300 on far, last heartbeat 0 s ago"):
        world.acquire(storage)
    assert world.now == 1059


def test_clocks_of_different_machines_are_not_compared(world: World, storage: RecordingStorage) -> None:
    theirs = world.acquire(storage, FAR)
    storage.publish(lease_name(1), replace(theirs.info, heartbeat_at=1e12).to_bytes(), exclusive=False)
    assert world.acquire(storage, stale_secs=5).epoch == 2
    assert world.now == 1005


def test_a_lease_that_nobody_can_read_is_watched_too(world: World, storage: RecordingStorage) -> None:
    storage.publish(lease_name(4), b"not json", exclusive=True)
    assert world.acquire(storage).epoch == 5
    assert world.now == 1060


def test_of_two_takers_one_wins(world: World, storage: RecordingStorage) -> None:
    """The other one creates the same epoch between our look and our creation."""
    world.acquire(storage, NEIGHBOUR)
    world.living.add(FAR.pid)
    rivals: list[Lease] = []

    class Overtaken(LocalStorage):
        def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
            if not rivals:
                rivals.append(World().acquire(LocalStorage(self.root), FAR, "rival", stale_secs=0))
                world.meanwhile = rivals[0].heartbeat
            super().publish(path, data, exclusive=exclusive)

    with pytest.raises(DirectoryHeldError, match="run rival"):
        world.acquire(Overtaken(storage.root))
    assert rivals[0].epoch == 2
    rivals[0].check()


def test_a_taker_that_has_seen_no_lease_does_not_begin_at_one_beside_a_live_holder(
    world: World, tmp_path: Path
) -> None:
    """Seen with three takers at once: what its listing showed was gone when it came to read it, because the
    winner had swept it up. It put the winner's attempt out of reach, until its own first commit failed."""
    holders: list[Lease] = []

    class Swept(LocalStorage):
        def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
            if not holders:
                holders.append(World().acquire(LocalStorage(self.root), FAR, "winner", stale_secs=0))
                world.meanwhile = holders[0].heartbeat
                (tmp_path / ATTEMPT).mkdir()
            return super().read_bytes(path, max_bytes=max_bytes)

    world.acquire(LocalStorage(tmp_path), NEIGHBOUR)
    world.living.add(FAR.pid)
    with pytest.raises(DirectoryHeldError, match="run winner"):
        world.acquire(Swept(tmp_path))
    holders[0].check()
    assert (tmp_path / ATTEMPT).is_dir(), "the winner's save in flight was fenced"
    assert leases(LocalStorage(tmp_path)) == [lease_name(2)]


def test_a_taker_whose_lease_a_later_holder_swept_up_is_told_who_holds(world: World, tmp_path: Path) -> None:
    holders: list[Lease] = []

    class SweptUp(LocalStorage):
        def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
            if not holders:
                World().acquire(LocalStorage(self.root), NEIGHBOUR, "first", stale_secs=0)
                holders.append(World().acquire(LocalStorage(self.root), FAR, "second", stale_secs=0))
                world.meanwhile = holders[0].heartbeat
                raise NotFoundError("the temporary file is gone")
            super().publish(path, data, exclusive=exclusive)

    world.living.add(FAR.pid)
    with pytest.raises(DirectoryHeldError, match="run second"):
        world.acquire(SweptUp(tmp_path))


def test_a_lease_that_cannot_be_created_at_all_is_an_error(world: World, tmp_path: Path) -> None:
    class Gone(LocalStorage):
        def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
            raise NotFoundError("no such mount")

    with pytest.raises(NotFoundError, match="no such mount"):
        world.acquire(Gone(tmp_path))


def test_without_exclusive_creation_the_last_writer_wins(world: World, tmp_path: Path) -> None:
    storage = LastWriterWins(tmp_path)
    world.living.add(NEIGHBOUR.pid)

    def overwrite() -> None:
        rival = LeaseInfo(1, NEIGHBOUR, "rival", heartbeat=0, heartbeat_at=0.0, released=False)
        LocalStorage(tmp_path).publish(lease_name(1), rival.to_bytes(), exclusive=False)

    storage.meanwhile = overwrite
    with pytest.raises(DirectoryHeldError, match="run rival"):
        world.acquire(storage)
    storage.meanwhile = lambda: None
    world.living.clear()
    assert world.acquire(storage).epoch == 2


def test_an_overtaken_holder_may_not_commit(world: World, storage: RecordingStorage) -> None:
    theirs = world.acquire(storage, FAR)
    theirs.check()
    ours = world.acquire(storage)
    with pytest.raises(LeaseLostError, match=r"another run has taken over "):
        theirs.check()
    before = storage.read_bytes(lease_name(2), max_bytes=9999)
    with pytest.raises(LeaseLostError):
        theirs.heartbeat()
    theirs.release()
    assert leases(storage) == ["lease-00000002"], "it wrote nothing back"
    assert storage.read_bytes(lease_name(2), max_bytes=9999) == before
    ours.check()


def test_a_higher_epoch_that_the_listing_does_not_show_yet_is_found_by_name(
    world: World, tmp_path: Path
) -> None:
    class CachedListing(LocalStorage):
        def list_dir(self, path: str = "") -> list:
            return [entry for entry in super().list_dir(path) if entry.name != lease_name(2)]

    lease = world.acquire(CachedListing(tmp_path))
    lease.check()
    LocalStorage(tmp_path).publish(lease_name(2), b"{}", exclusive=True)
    with pytest.raises(LeaseLostError):
        lease.check()


def test_another_run_that_began_again_at_epoch_one_is_noticed(
    world: World, storage: RecordingStorage
) -> None:
    """Somebody emptied the directory under a running job and started another there."""
    theirs = world.acquire(storage, FAR)
    storage.delete_file(lease_name(1))
    world.acquire(storage)
    with pytest.raises(LeaseLostError):
        theirs.check()


def test_a_lease_file_deleted_by_hand_comes_back(world: World, storage: RecordingStorage) -> None:
    lease = world.acquire(storage)
    storage.delete_file(lease_name(1))
    lease.heartbeat()
    assert leases(storage) == [lease_name(1)]


def test_heartbeats_count_up(world: World, storage: RecordingStorage) -> None:
    lease = world.acquire(storage)
    for _ in range(3):
        lease.heartbeat()
    stored = LeaseInfo.from_bytes(storage.read_bytes(lease_name(1), max_bytes=9999), 1, what="lease")
    assert stored == lease.info
    assert (stored.heartbeat, stored.released) == (3, False)


def test_release_stands_against_a_late_heartbeat(world: World, storage: RecordingStorage) -> None:
    lease = world.acquire(storage)
    lease.release()
    storage.calls.clear()
    lease.heartbeat()
    assert storage.calls == []
    stored = LeaseInfo.from_bytes(storage.read_bytes(lease_name(1), max_bytes=9999), 1, what="lease")
    assert stored.released


def test_releasing_in_a_directory_that_is_gone_is_fine(world: World, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lease = world.acquire(LocalStorage(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    lease.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [StorageUnavailableError, ConfigError])
def test_the_thread_beats_goes_on_after_a_failure_and_ends_with_release(
    kind: type[Exception], world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beaten = threading.Event()

    class Flaky(LocalStorage):
        beats = 0

        def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
            if not exclusive:
                self.beats += 1
                if self.beats == 1:
                    raise kind("the store is away")
                if self.beats == 3:
                    beaten.set()
            super().publish(path, data, exclusive=exclusive)

    lease = world.acquire(Flaky(tmp_path))
    with caplog.at_level(logging.WARNING, "engine"):
        lease.start_heartbeat(interval_secs=0.001)
        assert beaten.wait(30)
    assert "the store is away" in caplog.text
    lease.release()
    assert not [thread for thread in threading.enumerate() if thread.name == "holdfast-lease"]


def test_the_thread_ends_when_the_lease_is_lost(world: World, storage: RecordingStorage) -> None:
    lease = world.acquire(storage, FAR)
    world.acquire(storage)
    lease.start_heartbeat(interval_secs=0.001)
    assert lease._thread is not None
    lease._thread.join(30)
    assert not lease._thread.is_alive()


def attempts(root: Path) -> None:
    (root / ATTEMPT).mkdir()
    (root / ATTEMPT / "shard-00000.safetensors").write_bytes(b"half")
    (root / COMMITTED).mkdir()
    (root / COMMITTED / "manifest.json").write_bytes(b"{}")
    (root / "notes").mkdir()


def test_taking_over_buries_unfinished_attempts_and_nothing_else(
    world: World, storage: RecordingStorage
) -> None:
    world.acquire(storage, NEIGHBOUR)
    attempts(Path(storage.root))
    world.acquire(storage)
    assert {entry.name for entry in storage.list_dir() if entry.is_dir} == {
        "dead-" + ATTEMPT,
        COMMITTED,
        "notes",
    }
    assert storage.calls.index("publish lease-00000002") < storage.calls.index(
        f"rename {ATTEMPT} dead-{ATTEMPT}"
    )
    assert not [call for call in storage.calls if COMMITTED in call], "never out of sight, not even briefly"


def test_a_commit_that_beat_the_takeover_is_kept(world: World, tmp_path: Path) -> None:
    """The old holder commits between our listing and our rename: its checkpoint must not vanish."""

    class CommitsMeanwhile(LocalStorage):
        def rename(self, src: str, dst: str) -> bool:
            if src == ATTEMPT:
                (tmp_path / src / "manifest.json").write_bytes(b"{}")
            return super().rename(src, dst)

    world.acquire(LocalStorage(tmp_path), NEIGHBOUR)
    attempts(tmp_path)
    world.acquire(CommitsMeanwhile(tmp_path))
    assert (tmp_path / ATTEMPT / "manifest.json").exists()
    assert not (tmp_path / f"dead-{ATTEMPT}").exists()


def test_where_nothing_can_be_renamed_attempts_stay(world: World, tmp_path: Path) -> None:
    world.acquire(StoreLike(tmp_path), NEIGHBOUR)
    attempts(tmp_path)
    world.acquire(StoreLike(tmp_path))
    assert (tmp_path / ATTEMPT).exists()


@pytest.mark.parametrize("kind", [LocalStorage, StoreLike])
def test_the_listing_of_a_takeover_is_what_lies_there_afterwards(
    world: World, tmp_path: Path, kind: type[LocalStorage]
) -> None:
    """Whoever has acquired the directory need not list it again."""
    world.acquire(kind(tmp_path), NEIGHBOUR)
    attempts(tmp_path)
    lease = world.acquire(kind(tmp_path))
    heads = lease.take_heads()
    assert heads is not None
    there = kind(tmp_path).list_heads()
    assert {**heads.tree, "": {}} == {**there.tree, "": {}}
    assert heads.whole == there.whole
    assert lease.take_heads() is None, "it is old by now"


@pytest.mark.parametrize("what", ["commits", "is buried by another"])
def test_there_is_no_listing_of_a_takeover_that_was_not_alone(
    world: World, tmp_path: Path, what: str
) -> None:
    class Meanwhile(LocalStorage):
        def rename(self, src: str, dst: str) -> bool:
            if src == ATTEMPT and what == "commits":
                (tmp_path / src / "manifest.json").write_bytes(b"{}")
            elif src == ATTEMPT:
                super().rename(src, dst)
            return super().rename(src, dst)

    world.acquire(LocalStorage(tmp_path), NEIGHBOUR)
    attempts(tmp_path)
    assert world.acquire(Meanwhile(tmp_path)).take_heads() is None


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b'{"pid":"7"}', b'{"boot_id":"b","heartbeat":true}'],
    ids=lambda raw: raw.decode(),
)
def test_a_lease_file_that_is_none_is_damaged(raw: bytes) -> None:
    with pytest.raises(DamagedError, match="lease-x"):
        LeaseInfo.from_bytes(raw, 1, what="lease-x")


def test_a_newer_lease_with_more_fields_is_understood() -> None:
    from engine.format.json import canonical_bytes, parse_canonical

    info = LeaseInfo(3, FAR, "run", heartbeat=1, heartbeat_at=2.5, released=False)
    more = parse_canonical(info.to_bytes(), what="lease") | {"zone": "eu"}
    assert LeaseInfo.from_bytes(canonical_bytes(more), 3, what="lease") == info


def test_this_process_lives_and_is_told_from_one_that_had_its_pid() -> None:
    me = ProcessIdentity.current()
    assert me.pid == os.getpid()
    assert me == ProcessIdentity.current()
    assert is_alive(me) is True
    assert is_alive(replace(me, start_time=me.start_time - 1)) is False


def test_a_process_that_ended_is_dead_even_while_nobody_waits_for_it() -> None:
    code = (
        "from engine.lease.process import ProcessIdentity as P; p = P.current(); print(p.pid, p.start_time)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        pid, start_time = map(int, child.stdout.read().split())
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        process = replace(ProcessIdentity.current(), pid=pid, start_time=start_time)
        assert is_alive(process) is False
    assert is_alive(process) is False


def test_pid_namespaces_keep_equal_pids_apart() -> None:
    assert HERE.shares_pids_with(NEIGHBOUR)
    assert not HERE.shares_pids_with(CONTAINER)
    assert not HERE.shares_pids_with(FAR)
