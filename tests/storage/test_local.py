"""What only a local directory has: durability in the right order, permissions, links, special files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from engine.errors import (
    AlreadyExistsError,
    DamagedError,
    HostilePathError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)
from engine.storage.local import LocalStorage
from tests.storage.buffers import source
from tests.storage.systems import FailsAt, Recording, StrictDirect


def test_commit_is_durable_before_it_is_visible(tmp_path: Path) -> None:
    system = Recording()
    LocalStorage(tmp_path, system=system).publish("manifest.json", b"{}", exclusive=True)
    assert system.events == [
        "create manifest.tmp",
        "write manifest.tmp",
        "fsync manifest.tmp",
        "link manifest.tmp manifest.json",
        "unlink manifest.tmp",
        f"fsync {tmp_path.name}/",
    ]


def test_replacing_publish_is_durable_before_it_is_visible(tmp_path: Path) -> None:
    system = Recording()
    LocalStorage(tmp_path, system=system).publish("held", b"{}", exclusive=False)
    assert system.events == [
        "create held.tmp",
        "write held.tmp",
        "fsync held.tmp",
        "replace held.tmp held",
        f"fsync {tmp_path.name}/",
    ]


def test_shard_is_cut_then_synced(tmp_path: Path) -> None:
    class Both(Recording, StrictDirect):
        def __init__(self) -> None:
            StrictDirect.__init__(self)
            Recording.__init__(self)

    system = Both()
    LocalStorage(tmp_path, system=system).write_shard("shard", source(b"x" * 5000))
    assert system.events == ["create shard", "write shard", "truncate shard 5000", "fsync shard"]


def test_every_created_directory_is_synced_in_its_parent(tmp_path: Path) -> None:
    system = Recording()
    LocalStorage(tmp_path / "runs", system=system).make_dir("one/two")
    assert system.events == [
        "mkdir runs",
        f"fsync {tmp_path.name}/",
        "mkdir one",
        "fsync runs/",
        "mkdir two",
        "fsync one/",
    ]


def test_directory_that_another_rank_made_meanwhile_is_synced_too(tmp_path: Path) -> None:
    class OtherRank(Recording):
        def mkdir(self, path: str) -> None:
            os.mkdir(path)
            super().mkdir(path)

    system = OtherRank()
    LocalStorage(tmp_path, system=system).make_dir("step")
    assert f"fsync {tmp_path.name}/" in system.events


@pytest.mark.parametrize("call", ["pwrite", "fsync", "link", "chmod"])
def test_failed_publish_shows_and_leaves_nothing(tmp_path: Path, call: str) -> None:
    with pytest.raises(StorageFullError, match="manifest"):
        LocalStorage(tmp_path, system=FailsAt(call, errno.ENOSPC)).publish("manifest", b"{}", exclusive=True)
    assert list(tmp_path.iterdir()) == []


def test_failed_replace_keeps_the_older_file(tmp_path: Path) -> None:
    (tmp_path / "held").write_bytes(b"older")
    with pytest.raises(StorageError):
        LocalStorage(tmp_path, system=FailsAt("replace", errno.EIO)).publish("held", b"new", exclusive=False)
    assert (tmp_path / "held").read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["held"]


def test_file_system_without_hard_links(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, system=FailsAt("link", errno.EPERM))
    storage.publish("a", b"one", exclusive=True)
    with pytest.raises(AlreadyExistsError):
        storage.publish("a", b"two", exclusive=True)
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_file_system_with_neither_links_nor_exclusive_renames(tmp_path: Path) -> None:
    system = FailsAt("link", errno.EPERM)
    system.rename_new = FailsAt("rename_new", errno.EINVAL).rename_new  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="neither hard links nor exclusive renames"):
        LocalStorage(tmp_path, system=system).publish("a", b"one", exclusive=True)
    assert list(tmp_path.iterdir()) == []


def test_answer_to_the_link_was_lost(tmp_path: Path) -> None:
    """NFS repeats the request, and the server answers that the name is taken: by us."""

    class LostAnswer(Recording):
        def link(self, src: str, dst: str) -> None:
            os.link(src, dst)
            raise FileExistsError(errno.EEXIST, "exists")

    LocalStorage(tmp_path, system=LostAnswer()).publish("a", b"mine", exclusive=True)
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    modes: list[int] = []

    class Watching(Recording):
        def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
            modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
            return super().pwrite(fd, view, offset)

    before = os.umask(umask)
    try:
        storage = LocalStorage(tmp_path, system=Watching())
        storage.publish("manifest", b"{}", exclusive=True)
        storage.write_file("index", b"{}")
        assert modes == [0o600, 0o600]
        storage.write_shard("shard", source(b"x"))
    finally:
        os.umask(before)
    for name in ("manifest", "index", "shard"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").symlink_to(tmp_path / "outside/secret")
    (root / "step").symlink_to(tmp_path / "outside")
    storage = LocalStorage(root)
    for path in ("file", "step/secret"):
        with pytest.raises(HostilePathError, match="symbolic link"):
            storage.read_bytes(path, max_bytes=100)
        with pytest.raises(HostilePathError):
            storage.open_reader(path)
    with pytest.raises(HostilePathError):
        storage.list_dir("step")
    assert storage.list_tree() == {"": {}}


def test_link_inside_the_directory_is_followed_but_not_listed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.make_dir("step")
    storage.write_file("step/a", b"1")
    (tmp_path / "newest").symlink_to("step")
    assert storage.read_bytes("newest/a", max_bytes=1) == b"1"
    assert storage.list_tree() == {"": {}, "step": {"a": 1}}


def test_the_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    storage = LocalStorage(tmp_path / "link")
    storage.write_file("a", b"1")
    assert storage.read_bytes("a", max_bytes=1) == b"1"


def test_deleting_a_link_spares_its_target(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"1")
    root = tmp_path / "root"
    (root / "step").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    (root / "step/inner").symlink_to(outside)
    storage = LocalStorage(root)
    storage.delete_tree("link")
    storage.delete_tree("step")
    assert (outside / "precious").read_bytes() == b"1"
    assert list(root.iterdir()) == []


def test_a_file_of_the_same_size_and_age_is_another_version(tmp_path: Path) -> None:
    """As `cp -p`, `rsync -t` and `tar` leave it: only the inode and the time of the last change tell."""
    storage = LocalStorage(tmp_path)
    storage.make_dir("step")
    storage.write_file("step/a", b"12345")
    before, found = storage.versions("step"), (tmp_path / "step/a").stat()
    storage.write_file("step/a", b"54321")
    os.utime(tmp_path / "step/a", ns=(found.st_atime_ns, found.st_mtime_ns))
    assert storage.versions("step") != before


def test_the_time_of_the_last_change_is_that_of_the_newest_name(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.make_dir("step")
    storage.write_file("step/a", b"1")
    os.utime(tmp_path / "step/a", (0, 0))
    os.utime(tmp_path / "step", (0, 0))
    changed = (tmp_path / "step/a").stat().st_ctime
    assert storage.last_change("step/a") == changed
    assert storage.last_change("step") >= changed
    with pytest.raises(NotFoundError):
        storage.last_change("nowhere")


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard")
    storage = LocalStorage(tmp_path)
    with pytest.raises(DamagedError, match="not a regular file"):
        storage.open_reader("shard")
    assert storage.list_tree() == {"": {}}
    with pytest.raises(NotFoundError):
        storage.size("shard")


def test_deleted_file_stays_readable(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_file("shard", b"12345")
    with storage.open_reader("shard") as reader:
        storage.delete_file("shard")
        target = bytearray(5)
        reader.read_into(0, memoryview(target))
    assert target == b"12345"


def test_reader_lets_go_of_its_descriptor(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_file("shard", b"12345")
    before = len(os.listdir("/proc/self/fd"))
    reader = storage.open_reader("shard")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_cut_while_it_is_read(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write_file("shard", b"12345")
    with storage.open_reader("shard") as reader:
        os.truncate(tmp_path / "shard", 3)
        with pytest.raises(DamagedError, match="truncated: it ends at byte 3"):
            reader.read_into(0, memoryview(bytearray(5)))


def test_directory_that_vanishes_during_a_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    for name in ("one", "two"):
        storage.make_dir(name)
        storage.write_file(f"{name}/a", b"1")
    listed = LocalStorage.list_dir

    def list_dir(self: LocalStorage, path: str = "") -> object:
        if path == "one":
            self.delete_tree("one")
        return listed(self, path)

    monkeypatch.setattr(LocalStorage, "list_dir", list_dir)
    assert storage.list_tree() == {"": {}, "two": {"a": 1}}


def test_unreadable_directory_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected, for tests may run as root."""

    def denied(path: str) -> object:
        raise PermissionError(errno.EACCES, "denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    storage = LocalStorage(tmp_path)
    for use in (storage.list_dir, storage.list_tree):
        with pytest.raises(StorageDeniedError, match="no permission"):
            use()


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = LocalStorage(tmp_path / "file")
    with pytest.raises(StorageError, match="is a file, not a directory"):
        storage.list_dir()
    with pytest.raises(StorageError):
        storage.make_dir()
    assert storage.exists("anything") is False


def test_root_that_is_missing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "nowhere")
    for use in (storage.list_dir, storage.list_tree, storage.free_bytes):
        with pytest.raises(NotFoundError, match="nowhere"):
            use()


def test_rename_does_not_replace(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.make_dir("step")
    storage.make_dir("dead-step")  # rename(2) would replace an empty directory
    with pytest.raises(AlreadyExistsError):
        storage.rename("step", "dead-step")
    with pytest.raises(NotFoundError):
        storage.rename("nowhere", "dead-nowhere")
    assert storage.exists("step")


def test_rename_is_durable(tmp_path: Path) -> None:
    system = Recording()
    storage = LocalStorage(tmp_path, system=system)
    storage.make_dir("step")
    system.events.clear()
    assert storage.rename("step", "dead-step")
    assert system.events == ["replace step dead-step", f"fsync {tmp_path.name}/"]


@pytest.mark.parametrize("name", ["\udcff", "a\\b", "line\nbreak", "lost+found"])
def test_a_directory_that_is_not_ours_does_not_hide_what_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ours = "step-00000001-00000000"
    for directory in (name, ours):
        os.mkdir(os.path.join(tmp_path, directory))
    (tmp_path / ours / "manifest.json").write_bytes(b"{}")
    scandir = os.scandir

    def guarded(path: str) -> object:
        if path.endswith("lost+found") or denied in path:
            raise PermissionError(errno.EACCES, "denied")
        return scandir(path)

    monkeypatch.setattr("engine.storage.local.os.scandir", guarded)
    denied = "nothing"
    assert LocalStorage(tmp_path).list_tree()[ours] == {"manifest.json": 2}
    denied = ours
    with pytest.raises(StorageDeniedError):
        LocalStorage(tmp_path).list_tree()
