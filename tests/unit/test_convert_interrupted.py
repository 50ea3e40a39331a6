"""Whatever stops an export, import or merge: nothing half-written is left. And memory stays small."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch

from engine.convert.export import ExportOptions
from engine.convert.merge import merge_checkpoints
from engine.directory.listing import list_checkpoints
from engine.errors import StorageFullError
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from engine.storage.system import System
from tests.support.conversions import export_checkpoint, import_checkpoint
from tests.support.tiny_gpt2 import train

Progress = Callable[[int], None]


class Stop:
    """A progress that stops the work at its k-th call."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at = at
        self.error = error
        self.calls = 0

    def __call__(self, count: int) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, [record.id for record in train(directory)[1]]


@pytest.fixture(params=["disk", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address to write below, on a disk or in a store."""
    if request.param == "disk":
        (tmp_path / "place").mkdir()
        return str(tmp_path / "place")
    return f"memory://{uuid.uuid4().hex}"


def files(place: str) -> list[str]:
    """Every file below a place, leases aside: those belong to the directory, not to the work."""
    if "://" in place:
        root = place.removeprefix("memory:/")
        found = [name.removeprefix(root + "/") for name in fsspec.filesystem("memory").find(root)]
    else:
        found = [os.path.relpath(os.path.join(d, f), place) for d, _, fs in os.walk(place) for f in fs]
        found += [os.path.relpath(os.path.join(d, f), place) for d, fs, _ in os.walk(place) for f in fs]
    return sorted(name for name in found if "lease-" not in name)


def export(trained: tuple[Path, list[str]], place: str, format: str, progress: Progress) -> None:
    directory, ids = trained
    export_checkpoint(
        LocalStorage(directory), ids[-1], f"{place}/out", ExportOptions(format=format), progress=progress
    )


@pytest.mark.parametrize("at", ["first", "middle", "last"])
@pytest.mark.parametrize("format", ["hf", "torch", "dcp"])
def test_an_export(trained: tuple[Path, list[str]], place: str, format: str, at: str) -> None:
    counting = Stop(0)
    export(trained, f"{place}/whole", format, counting)
    for name in files(place):
        assert name.startswith("whole/out") or name == "whole"
    before = files(place)
    stop = Stop({"first": 1, "middle": counting.calls // 2, "last": counting.calls}[at])
    with pytest.raises(KeyboardInterrupt):
        export(trained, place, format, stop)
    assert stop.calls == stop.at
    assert files(place) == before


@pytest.mark.parametrize("at", ["first", "last"])
@pytest.mark.parametrize("format", ["hf", "torch", "dcp"])
def test_an_import(
    trained: tuple[Path, list[str]], place: str, tmp_path: Path, format: str, at: str
) -> None:
    export(trained, str(tmp_path), format, lambda count: None)
    counting = Stop(0)
    import_checkpoint(str(tmp_path / "out"), f"{place}/run", progress=counting)
    before = files(place)
    stop = Stop(1 if at == "first" else counting.calls)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(str(tmp_path / "out"), f"{place}/run", progress=stop)
    assert files(place) == before
    assert [item.status for item in list_checkpoints(open_storage(f"{place}/run"))] == ["committed"]
    import_checkpoint(str(tmp_path / "out"), f"{place}/run")


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_merge(trained: tuple[Path, list[str]], place: str, at: str) -> None:
    directory, ids = trained
    sources: list[tuple[Storage, str]] = [(LocalStorage(directory), id) for id in ids]
    target = open_storage(f"{place}/run")
    counting = Stop(0)
    merge_checkpoints(sources, target, progress=counting)
    before = files(place)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(sources, target, progress=Stop(1 if at == "first" else counting.calls))
    assert files(place) == before
    assert [item.status for item in list_checkpoints(target)] == ["committed"]


def test_a_disk_without_room_for_the_shard_is_an_error_not_a_crash(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its space is reserved before anything is read to be converted."""

    def full(self: System, fd: int, file_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(System, "fallocate", full)
    directory, ids = trained
    sources: list[tuple[Storage, str]] = [(LocalStorage(directory), id) for id in ids]
    with pytest.raises(StorageFullError, match=r"shard-00000\.safetensors: the disk is full"):
        merge_checkpoints(sources, LocalStorage(tmp_path))
    assert files(str(tmp_path)) == []


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


BIG_BYTES = 160 << 20


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A state of five tensors of 32 MiB."""
    directory = tmp_path_factory.mktemp("big")
    torch.save({"model": {f"w{i}": torch.ones(8, 1 << 20) for i in range(5)}}, directory / "big.pt")
    record, _ = import_checkpoint(str(directory / "big.pt"), str(directory / "run"))
    (directory / "big.pt").unlink()
    return directory / "run", record.id


@pytest.mark.parametrize("work", ["torch", "dcp", "merge"])
def test_memory_is_bounded(
    big: tuple[Path, str], tmp_path: Path, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.convert.tensors.WINDOW_BYTES", 4 << 20)
    directory, id = big
    storage = LocalStorage(directory)
    most, done = 0, 0

    def look(count: int) -> None:
        nonlocal most, done
        done += count
        most = max(most, anonymous_bytes())

    before = anonymous_bytes()
    if work == "merge":
        merge_checkpoints([(storage, id), (storage, id)], LocalStorage(tmp_path), progress=look)
    else:
        options = ExportOptions(format=work)
        export_checkpoint(storage, id, str(tmp_path / "out"), options, progress=look)
    assert done == BIG_BYTES
    assert most - before < BIG_BYTES // 2
