"""Clean-up and what is not Holdfast's: mounts, links, people's files, copies that are still arriving."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import Checkpointer
from engine.directory import marks
from engine.directory.clean_up import delete_expired
from engine.directory.listing import committed, exempt_ids, list_checkpoints
from engine.directory.reaper import delete_attempt, reap, reap_abandoned
from engine.directory.retention import Decision, Retention, decide_retention
from engine.directory.verify import verify_checkpoint
from engine.errors import NotOursError
from engine.format.names import is_attempt_of, lease_name, new_attempt
from engine.lease.arrivals import QUIET_SECS
from engine.lease.lease import STALE_SECS, Lease
from engine.lease.process import ProcessIdentity
from engine.restore.choice import choose_checkpoint
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from tests.support.mounts import run_with_mounts
from tests.support.tiny_checkpoint import write_checkpoint

GONE = replace(ProcessIdentity.current(), start_time=1)
"""Had the pid of this process before it."""


@pytest.fixture(params=["directory", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "directory":
        return LocalStorage(tmp_path / "run")
    return open_storage(f"memory://{tmp_path.name}", {})


def expire_all_but_two(storage: Storage) -> tuple[str, ...]:
    listed = list_checkpoints(storage)
    keep = Retention(rolling=0, best=0, epochs=False)
    policy = decide_retention(committed(listed), keep, exempt=exempt_ids(listed))
    return reap(storage, policy).deleted


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


RETIRE = """
    import logging
    logging.basicConfig(format="%(message)s")
    from engine.directory.listing import committed, exempt_ids, list_checkpoints
    from engine.lease.lease import Lease
    from engine.directory.reaper import reap, reap_abandoned
    from engine.directory.retention import Retention, decide_retention
    from engine.storage.local import LocalStorage
    storage = LocalStorage(folder / "run")
    with Lease.acquire(storage, run_id="run") as lease:
        for _ in range(2):
            listed = list_checkpoints(storage)
            keep = Retention(rolling=0, best=0, epochs=False)
            policy = decide_retention(committed(listed), keep, exempt=exempt_ids(listed))
            print("deleted", reap(storage, policy).deleted)
            print("abandoned", reap_abandoned(storage, lease=lease).deleted)
"""


def test_what_is_mounted_below_an_expired_checkpoint_stays(tmp_path: Path) -> None:
    """A file system of its own, a directory of the same one (whose device number is the same), and a file."""
    one, *_ = (write_checkpoint(tmp_path / "run", sequence=n, rows=2) for n in (1, 2, 3))
    home = tmp_path / "home"
    (home / "papers").mkdir(parents=True)
    (home / "papers" / "thesis").write_text("precious")
    (home / "index").write_text("precious")
    said = run_with_mounts(
        tmp_path,
        f"""
        inside = folder / "run" / {one!r}
        for name in ("scratch", "papers"):
            (inside / name).mkdir()
        (inside / "shard-00009.json").touch()
        mount("-t", "tmpfs", "none", inside / "scratch")
        mount("--bind", folder / "home" / "papers", inside / "papers")
        mount("--bind", folder / "home" / "index", inside / "shard-00009.json")
        (inside / "scratch" / "results").write_text("precious")
        def left():
            print(sorted(path.relative_to(inside).as_posix() for path in inside.rglob("*") if path.is_file()))
        """,
        # An index that the manifest does not name is damage; here it stands for a file that is mounted over.
        RETIRE.replace("committed(listed)", "[item.record for item in listed if item.record]"),
        "left()",
    )
    assert f"deleted ('{one}',)" in said
    assert "['papers/thesis', 'scratch/results', 'shard-00009.json']" in said
    assert said.count("it contains files that Holdfast did not write: papers, scratch, shard-00009.json") == 1
    assert files_below(home) == {"papers/thesis": b"precious", "index": b"precious"}


@pytest.mark.parametrize("commit", [True, False], ids=["checkpoint", "attempt"])
def test_a_directory_that_is_mounted_in_a_checkpoints_place_is_left_alone(
    commit: bool, tmp_path: Path
) -> None:
    """Another run's checkpoint: all of its files have names that this run would delete."""
    for n in (2, 3):
        write_checkpoint(tmp_path / "run", sequence=n, rows=2)
    theirs = write_checkpoint(tmp_path / "theirs", sequence=1, rows=2, commit=commit)
    before = files_below(tmp_path / "theirs")
    said = run_with_mounts(
        tmp_path,
        f"""
        from engine.lease import arrivals
        arrivals.QUIET_SECS = 0.0
        (folder / "run" / {theirs!r}).mkdir()
        mount("--bind", folder / "theirs" / {theirs!r}, folder / "run" / {theirs!r})
        """,
        RETIRE,
    )
    assert said.count("deleted ()") == said.count("abandoned ()") == 2
    assert said.count("is a mount point: what is mounted there is left alone") == 1
    assert files_below(tmp_path / "theirs") == before


def test_a_link_in_a_checkpoints_place_is_read_and_never_removed(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for n in (2, 3):
        write_checkpoint(root, sequence=n, rows=2)
    linked = write_checkpoint(tmp_path / "archive", sequence=1, rows=2)
    (root / linked).symlink_to(tmp_path / "archive" / linked)
    before = files_below(tmp_path / "archive")
    storage = LocalStorage(root)
    (item,) = [item for item in list_checkpoints(storage) if item.id == linked]
    assert (item.status, item.link) == ("committed", str(tmp_path / "archive" / linked))
    assert verify_checkpoint(storage, linked).ok
    assert exempt_ids(list_checkpoints(storage)) == {
        linked: "a symbolic link",
        item.link: f"{linked} links to it",
    }
    assert expire_all_but_two(storage) == ()
    assert item.record is not None
    assert reap(storage, [Decision(item.record, False, "a decision from before it was a link")]).deleted == ()
    for change in (
        lambda: marks.hold(storage, linked),
        lambda: marks.mark_damaged(storage, linked, "bad"),
        lambda: storage.delete_file(f"{linked}/manifest.json"),
        lambda: storage.clear_dir(linked, lambda name: True),
        lambda: storage.rename(linked, "dead-" + linked),
        lambda: storage.make_dir(f"{linked}/inner"),
    ):
        with pytest.raises(NotOursError, match="symbolic link: neither the link nor what it points at"):
            change()
    assert (root / linked).is_symlink()
    assert files_below(tmp_path / "archive") == before


def test_a_link_of_any_name_to_one_checkpoint_is_read_and_not_marked(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path / "archive", sequence=1, rows=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "the-good-one").symlink_to(tmp_path / "archive" / id)
    choice = choose_checkpoint(LocalStorage(tmp_path / "other"), str(tmp_path / "run" / "the-good-one"))
    assert choice is not None
    assert choice.record.id == id
    storage = LocalStorage(tmp_path / "run")
    assert verify_checkpoint(storage, "the-good-one").ok
    assert list_checkpoints(storage) == [], "but it is none of that directory's"
    with pytest.raises(NotOursError):
        marks.mark_damaged(storage, "the-good-one", "bad")


def test_what_a_link_beside_it_leads_to_is_not_removed_either(tmp_path: Path) -> None:
    one, *_ = (write_checkpoint(tmp_path, sequence=n, rows=2) for n in (1, 2, 3))
    (tmp_path / "step-00000010-000000aa").symlink_to(one)
    storage = LocalStorage(tmp_path)
    assert expire_all_but_two(storage) == ()
    with Lease.acquire(storage, run_id="run") as lease:
        assert not delete_expired(storage, lease, Retention(rolling=0, best=0, epochs=False))
    (tmp_path / "step-00000010-000000aa").unlink()
    assert expire_all_but_two(LocalStorage(tmp_path)) == (one,)


def test_an_unfinished_attempt_that_is_a_link_is_left_alone(tmp_path: Path, nothing_arrives: None) -> None:
    theirs = write_checkpoint(tmp_path / "theirs", sequence=1, rows=2, commit=False)
    before = files_below(tmp_path / "theirs")
    root = tmp_path / "run"
    root.mkdir()
    (root / theirs).symlink_to(tmp_path / "theirs" / theirs)
    storage = LocalStorage(root)
    with Lease.acquire(storage, run_id="run") as lease:
        assert reap_abandoned(storage, lease=lease).deleted == ()
    assert (root / theirs).is_symlink()
    assert files_below(tmp_path / "theirs") == before


def test_what_holdfast_did_not_write_stays_and_is_said_once(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, three = (write_checkpoint(storage, sequence=n, rows=2) for n in (1, 2, 3))
    marks.mark_damaged(storage, one, "bad")
    storage.delete_file(f"{one}/damaged.json")
    storage.write_file(f"{one}/shard-00000.json.0123abcd.tmp", b"")  # a crash left it behind
    foreign = ["NOTES.txt", "eval/scores.json", "shard-00000.safetensors.bak", ".manifest.json.Xa1"]
    storage.make_dir(f"{one}/eval")
    for name in foreign:
        storage.write_file(f"{one}/{name}", b"precious")
    caplog.set_level(logging.INFO, "engine")
    assert expire_all_but_two(storage) == (one,)
    with Lease.acquire(storage, run_id="run") as lease:
        for failed in (set(), {one}):
            reap_abandoned(storage, lease=lease, failed_ids=failed)
            assert not delete_attempt(storage, one)
    assert "may be a copy that is still arriving" not in caplog.text, "what is left is nobody's attempt"
    for name in foreign:
        assert storage.read_bytes(f"{one}/{name}", max_bytes=100) == b"precious"
    entries = [entry.name for entry in storage.list_dir(one)]
    assert sorted(entries) == [".manifest.json.Xa1", "NOTES.txt", "eval", "shard-00000.safetensors.bak"]
    assert [item.id for item in list_checkpoints(storage) if item.status == "committed"] == [two, three]
    (left,) = [item for item in list_checkpoints(storage) if item.id == one]
    assert left.reason == "only files that Holdfast did not write: they are never deleted"
    assert caplog.text.count("it contains files that Holdfast did not write") == 1


def test_empty_directories_links_and_odd_files_in_an_expired_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under names of the format: only what is a plain file is Holdfast's."""
    one, *_ = (write_checkpoint(tmp_path / "run", sequence=n, rows=2) for n in (1, 2, 3))
    inside, outside = tmp_path / "run" / one, tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("precious")
    (inside / "empty").mkdir()
    (inside / "held.0123abcd.tmp").symlink_to(outside / "data")
    (inside / "linked").symlink_to(outside)
    (inside / "red\x1b[31m\n").touch()
    (inside / "damaged.json.0123abcd.tmp").mkdir()
    (inside / "damaged.json.0123abcd.tmp" / "mine").write_text("precious")
    assert expire_all_but_two(LocalStorage(tmp_path / "run")) == (one,)
    assert sorted(path.name for path in inside.iterdir()) == [
        "damaged.json.0123abcd.tmp",
        "held.0123abcd.tmp",
        "linked",
        "red\x1b[31m\n",
    ]
    assert "'red\\x1b[31m\\n'" in caplog.text, "a name cannot paint the terminal or begin a line"
    assert (inside / "damaged.json.0123abcd.tmp" / "mine").exists()
    assert files_below(outside) == {"data": b"precious"}


class Copy:
    """A checkpoint that somebody copies in, piece by piece; the manifest first or last."""

    def __init__(self, storage: Storage, origin: Path, id: str, *, manifest_first: bool) -> None:
        self.storage, self.origin, self.id = storage, origin, id
        names = sorted(path.name for path in (origin / id).iterdir())
        assert names[0] == "manifest.json"
        self.names = names if manifest_first else [*names[1:], names[0]]

    def step(self, number: int) -> None:
        """Half of a file, or the rest of it."""
        name = self.names[number // 2]
        raw = (self.origin / self.id / name).read_bytes()
        self.storage.make_dir(self.id)
        self.storage.write_file(f"{self.id}/{name}", raw[: len(raw) // 2] if number % 2 == 0 else raw)

    @property
    def steps(self) -> int:
        return 2 * len(self.names)


@pytest.mark.parametrize("manifest_first", [True, False], ids=["manifest first", "manifest last"])
def test_a_copy_that_is_still_arriving_is_not_removed(
    manifest_first: bool, storage: Storage, tmp_path: Path
) -> None:
    """However long it takes, with pauses of less than an hour, over changes of the holder."""
    storage.make_dir()
    write_checkpoint(storage, sequence=7, rows=2)
    id = write_checkpoint(tmp_path / "origin", sequence=1, rows=2, world_size=2)
    copy, now = Copy(storage, tmp_path / "origin", id, manifest_first=manifest_first), [0.0]

    def acquire() -> Lease:
        return Lease.acquire(storage, run_id="run", clock=lambda: now[0], sleep=lambda _: None)

    lease = acquire()
    for number in range(copy.steps):
        copy.step(number)
        for _ in range(3):
            now[0] += QUIET_SECS / 4
            reap_abandoned(storage, lease=lease)
        if number % 3 == 2:
            lease.release()
            lease = acquire()
    lease.release()
    assert id in [record.id for record in committed(list_checkpoints(storage))]
    assert verify_checkpoint(storage, id).ok


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_copy_that_has_just_arrived_does_not_expire_yet(rounds: int, tmp_path: Path) -> None:
    """Its manifest came first and its sizes are right: whether all bytes are there, nobody can tell."""
    storage, now = LocalStorage(tmp_path / "run"), [0.0]
    for n in (7, 8, 9):
        write_checkpoint(storage, sequence=n, rows=2)
    copy = write_checkpoint(tmp_path / "origin", sequence=1, rows=2)
    keep = Retention(rolling=0, best=0, epochs=False)
    with Lease.acquire(storage, run_id="run", clock=lambda: now[0], sleep=lambda _: None) as lease:
        assert delete_expired(storage, lease, keep), "what was here before goes as the policy says"
        shutil.copytree(tmp_path / "origin" / copy, tmp_path / "run" / copy)
        for _ in range(rounds):
            assert not delete_expired(storage, lease, keep)
            now[0] += QUIET_SECS / 2
            (tmp_path / "run" / copy / "manifest.json").touch()
        assert not delete_expired(storage, lease, keep)
        now[0] += QUIET_SECS
        assert delete_expired(storage, lease, keep)
    assert [record.sequence for record in committed(list_checkpoints(storage))] == [8, 9]


def test_what_has_arrived_does_not_arrive_again(tmp_path: Path) -> None:
    """Putting a mark in it changes the directory, not the checkpoint."""
    storage, now = LocalStorage(tmp_path), [0.0]
    with Lease.acquire(storage, run_id="run", clock=lambda: now[0], sleep=lambda _: None) as lease:

        def arriving() -> set[str]:
            ids = [record.id for record in committed(list_checkpoints(storage))]
            return lease.arrivals.arriving(storage, ids, lease_name(lease.epoch))

        assert arriving() == set()
        id = write_checkpoint(storage, sequence=1, rows=2)
        assert arriving() == {id}
        now[0] += QUIET_SECS
        assert arriving() == set()
        marks.hold(storage, id)
        assert arriving() == set()


def test_one_that_was_deleted_and_is_copied_back_is_a_copy(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "run")
    one, *_ = (write_checkpoint(storage, sequence=n, rows=2) for n in (1, 2, 3))
    shutil.copytree(tmp_path / "run" / one, tmp_path / "kept")
    with Lease.acquire(storage, run_id="run") as lease:
        assert delete_expired(storage, lease, Retention(rolling=0, best=0, epochs=False))
        assert not reap_abandoned(storage, lease=lease).deleted
        (tmp_path / "run" / one).mkdir()
        shutil.copy(tmp_path / "kept" / "shard-00000.json", tmp_path / "run" / one)
        assert not reap_abandoned(storage, lease=lease).deleted
    assert (tmp_path / "run" / one / "shard-00000.json").exists()


def test_nothing_goes_in_favour_of_copies_that_are_arriving(tmp_path: Path) -> None:
    """They were committed later, and have the better metric: still, their bytes may not be there yet."""
    storage = LocalStorage(tmp_path / "run")
    for n in (7, 8, 9):
        write_checkpoint(storage, sequence=n, rows=2, metrics={"val_loss": float(n)})
    with Lease.acquire(storage, run_id="run") as lease:
        assert not delete_expired(storage, lease, Retention(rolling=3))
        for n in (21, 22, 23):
            write_checkpoint(storage, sequence=n, rows=2, metrics={"val_loss": 1.0})
        assert not delete_expired(storage, lease, Retention(rolling=0))
    assert [r.sequence for r in committed(list_checkpoints(storage))] == [7, 8, 9, 21, 22, 23]


def test_a_run_does_not_take_its_own_checkpoints_for_copies(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"t": torch.zeros(8)}, retention=Retention(rolling=2)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step).result(60.0)
    with Checkpointer(tmp_path, {"t": torch.zeros(8)}, retention=Retention(rolling=2)) as ckpt:
        ckpt.save(4).result(60.0)
    assert [r.step for r in committed(list_checkpoints(LocalStorage(tmp_path)))] == [3, 4]


def test_what_nobody_goes_on_with_is_removed_after_an_hour(storage: Storage) -> None:
    storage.make_dir()
    id, now = write_checkpoint(storage, sequence=1, rows=2, commit=False), [0.0]
    with Lease.acquire(storage, run_id="run", clock=lambda: now[0], sleep=lambda _: None) as lease:
        now[0] = STALE_SECS
        assert reap_abandoned(storage, lease=lease).deleted == ()
        now[0] += QUIET_SECS - 0.1
        assert reap_abandoned(storage, lease=lease).deleted == ()
        now[0] += 0.1
        assert reap_abandoned(storage, lease=lease).deleted == (id,)


def test_who_comes_later_goes_by_the_storages_clock(tmp_path: Path) -> None:
    """A program that runs for a moment cannot watch for an hour. Clocks of two machines are not compared."""
    ages = {"lease": 10.0 + QUIET_SECS, "attempt": 10.1}

    class OtherClock(LocalStorage):
        def last_change(self, path: str) -> float | None:
            return ages["lease" if path.startswith("lease-") else "attempt"]

    storage = OtherClock(tmp_path)
    id = write_checkpoint(storage, sequence=1, rows=2, commit=False)
    with Lease.acquire(storage, run_id="run") as lease:
        assert reap_abandoned(storage, lease=lease).deleted == ()
        ages["attempt"] = 10.0
        assert reap_abandoned(storage, lease=lease).deleted == (id,)


@pytest.mark.parametrize("released", [True, False], ids=["released", "died"])
def test_a_runs_own_checkpoint_that_comes_back_as_a_copy_is_not_put_aside(
    released: bool, tmp_path: Path
) -> None:
    """Its name carries the tag of the holder before. The time of its last change tells."""
    changes: dict[str, float] = {}

    class Clocked(LocalStorage):
        def last_change(self, path: str) -> float | None:
            return changes.get(path, 1000.0)

    storage = Clocked(tmp_path)
    holder = Lease.acquire(storage, run_id="before", process=GONE)
    if released:
        holder.release()
    left = new_attempt(10, "before", "left behind")
    arriving = new_attempt(20, "before", "arriving")
    for name in (left, arriving):
        storage.make_dir(name)
        storage.write_file(f"{name}/shard-00000.json", b"{}")
    changes[arriving] = 1000.1 if released else 1030.1
    with Lease.acquire(storage, run_id="after"):
        assert {entry.name for entry in storage.list_dir() if entry.is_dir} == {f"dead-{left}", arriving}


def test_an_attempt_tells_its_run() -> None:
    name = new_attempt(250, "one", "one/0/1")
    assert name.startswith("step-00000250-")
    assert is_attempt_of(name, ["another", "one"])
    assert not is_attempt_of(name, ["another"])
    assert len({new_attempt(250, "one", f"one/0/{n}") for n in range(200)}) > 190
    assert not is_attempt_of("dead-" + name, ["one"])
