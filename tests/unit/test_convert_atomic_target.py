"""A target is whole, or it is not there: on a disk by renaming, on a store by taking back."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

import fsspec
import pytest

from engine.convert.atomic_target import staged
from engine.errors import AlreadyExistsError, StorageFullError
from engine.storage.remote import FsspecStorage


def write_three(path: Path) -> None:
    path.mkdir()
    for name in ("a", "last", "z"):
        (path / name).write_bytes(name.encode())


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with staged(str(tmp_path / "new" / "out")) as path:
        write_three(path)
        assert names(tmp_path / "new") == [path.name]
        assert path.name != "out"
    assert names(tmp_path / "new") == ["out"]
    assert names(tmp_path / "new" / "out") == ["a", "last", "z"]


def test_a_file_too(tmp_path: Path) -> None:
    with staged(str(tmp_path / "model.pt")) as path:
        path.write_bytes(b"x")
        assert names(tmp_path) == [path.name]
    assert (tmp_path / "model.pt").read_bytes() == b"x"
    assert names(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_nothing_is_left_of_an_interrupted_one(tmp_path: Path, kind: str, stop: type[BaseException]) -> None:
    with pytest.raises(stop), staged(str(tmp_path / "out")) as path:  # noqa: PT012 - the block is the test
        write_three(path) if kind == "directory" else path.write_bytes(b"half")
        raise stop
    assert names(tmp_path) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StorageFullError, match="out: the disk is full"), staged(str(tmp_path / "out")):
        raise OSError(errno.ENOSPC, "no space")
    assert names(tmp_path) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(str(tmp_path / "out")) as path:  # an empty directory is as good as none
        write_three(path)
    with pytest.raises(AlreadyExistsError, match="is not overwritten"), staged(str(tmp_path / "out")):
        raise AssertionError("not entered")
    assert names(tmp_path / "out") == ["a", "last", "z"]


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(AlreadyExistsError), staged(str(tmp_path / "out")) as path:  # noqa: PT012
        write_three(path)
        (tmp_path / "out").write_bytes(b"mine")
    assert (tmp_path / "out").read_bytes() == b"mine"
    assert names(tmp_path) == ["out"]


@pytest.fixture
def bucket() -> str:
    return f"memory://bucket-{uuid.uuid4().hex}"


def in_store(bucket: str) -> list[str]:
    found = fsspec.filesystem("memory").find(bucket.removeprefix("memory:/"))
    return sorted(name.removeprefix(bucket.removeprefix("memory:/") + "/") for name in found)


def test_a_store_gets_the_last_file_last(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write = FsspecStorage.write_shard

    def noting(self: FsspecStorage, path: str, *args: object, **given: object) -> object:
        order.append(path)
        return write(self, path, *args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(FsspecStorage, "write_shard", noting)
    counted: list[int] = []
    with staged(f"{bucket}/out", last="last", progress=counted.append) as path:
        write_three(path)
        assert in_store(bucket) == []
    assert order == ["out/a", "out/z", "out/last"]
    assert in_store(bucket) == ["out/a", "out/last", "out/z"]
    assert sum(counted) == 6


def test_a_failed_upload_is_taken_back(bucket: str) -> None:
    def stop(count: int) -> None:
        if in_store(bucket):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), staged(f"{bucket}/out", progress=stop) as path:
        write_three(path)
    assert in_store(bucket) == []


def test_a_store_is_not_overwritten_either(bucket: str) -> None:
    with staged(f"{bucket}/out") as path:
        write_three(path)
    with pytest.raises(AlreadyExistsError), staged(f"{bucket}/out"):
        raise AssertionError("not entered")
