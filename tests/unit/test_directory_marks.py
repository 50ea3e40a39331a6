"""A mark of damage holds for the bytes that were seen, and goes from what is found whole."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.checkpoints.dispatch import main
from engine.directory import marks
from engine.directory.listing import Directory, list_checkpoints
from engine.errors import DamagedError
from engine.format.names import DAMAGED, MANIFEST
from engine.restore.choice import choose_checkpoint
from engine.restore.restorer import Restorer
from engine.storage.base import Storage
from engine.storage.local import LocalStorage, _version
from engine.storage.open import open_storage
from tests.support.damage import flip_byte
from tests.support.tiny_checkpoint import write_checkpoint

SHARD = "shard-00000.safetensors"


@pytest.fixture(params=["directory", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "directory":
        return LocalStorage(tmp_path / "run")
    return open_storage(f"memory://{tmp_path.name}", {})


def statuses(storage: Storage) -> dict[str, str]:
    return {item.id: item.status for item in list_checkpoints(storage)}


def rewrite(storage: Storage, path: str) -> None:
    """The same bytes once more, as a copy tool that mends a file writes them."""
    storage.write_file(path, storage.read_bytes(path, max_bytes=1 << 20))


@pytest.mark.parametrize("file", [SHARD, "shard-00000.json", MANIFEST])
def test_a_mark_does_not_hold_for_other_bytes(file: str, storage: Storage) -> None:
    id = write_checkpoint(storage, rows=2)
    marks.mark_damaged(storage, id, "block 3", seen=marks.seen(storage, id))
    assert statuses(storage) == {id: "damaged"}
    marks.hold(storage, id)
    storage.write_file(f"{id}/manifest.json.0123abcd.tmp", b"half")
    storage.write_file(f"{id}/NOTES.txt", b"looks bad")
    assert statuses(storage) == {id: "damaged"}, "what lies beside the data changes nothing"
    marks.release(storage, id)
    assert statuses(storage) == {id: "damaged"}
    rewrite(storage, f"{id}/{file}")
    assert statuses(storage) == {id: "committed"}
    assert choose_checkpoint(storage, "latest") is not None


def same_size_and_age(shard: Path) -> None:
    found, raw = shard.stat(), shard.read_bytes()
    shard.write_bytes(raw)
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns))


def another_inode(shard: Path) -> None:
    shutil.copy2(shard, shard.with_suffix(".new"))
    os.replace(shard.with_suffix(".new"), shard)


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_each_of_these_alone_tells(field: str) -> None:
    """Most changes change several of them; a network file system may show some of them late."""
    before = SimpleNamespace(st_size=1, st_mtime_ns=1, st_ctime_ns=1, st_ino=1)
    after = SimpleNamespace(**{**vars(before), field: 2})
    one, two = (SimpleNamespace(stat=lambda follow_symlinks, found=found: found) for found in (before, after))
    assert _version(one) != _version(two)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [same_size_and_age, another_inode, lambda shard: os.utime(shard, (1, 1))])
def test_what_tells_that_a_file_was_changed(change: Callable[[Path], None], tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    id = write_checkpoint(storage, rows=2)
    marks.mark_damaged(storage, id, "block 3", seen=marks.seen(storage, id))
    change(tmp_path / id / SHARD)
    assert statuses(storage) == {id: "committed"}


def test_a_mark_that_is_gone_does_not_hold(storage: Storage) -> None:
    """Somebody has taken it away since the listing."""
    assert not marks.read_damage_mark(storage, write_checkpoint(storage, rows=2)).holds


def test_a_mark_that_is_meant_to_hold_holds(storage: Storage) -> None:
    """A copy that is being mended in the mirror; and the marks of an older Holdfast."""
    id = write_checkpoint(storage, rows=2)
    marks.mark_damaged(storage, id, "sent again")
    rewrite(storage, f"{id}/{SHARD}")
    assert statuses(storage) == {id: "damaged"}


def test_what_is_still_too_short_without_its_mark_is_damaged(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    id = write_checkpoint(storage, rows=2)
    marks.mark_damaged(storage, id, "block 3", seen=marks.seen(storage, id))
    os.truncate(tmp_path / id / SHARD, 100)
    (item,) = list_checkpoints(storage)
    assert (item.status, item.reason[:31]) == ("damaged", f"{SHARD} has 100")


def test_a_directory_reads_a_mark_once(tmp_path: Path) -> None:
    reads = []

    class Counted(LocalStorage):
        def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
            reads.append(path)
            return super().read_bytes(path, max_bytes=max_bytes)

    storage = Counted(tmp_path)
    id = write_checkpoint(storage, rows=2)
    marks.mark_damaged(storage, id, "block 3", seen="other bytes")
    directory = Directory(storage)
    assert directory.everything() == directory.everything()
    assert [item.status for item in directory.everything()] == ["committed"]
    assert reads == [f"{id}/{MANIFEST}", f"{id}/{DAMAGED}"]


@pytest.mark.parametrize("selector", ["latest", "best", "step:20", "step-00000020-00000002", "backup"])
def test_every_selector_sees_what_is_whole_again(selector: str, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    losses = {1: 2.0, 2: 1.0, 3: 3.0}
    count = 3 if selector == "backup" else 2
    ids = [
        write_checkpoint(storage, sequence=n, rows=2, metrics={"val_loss": losses[n]})
        for n in range(1, count + 1)
    ]
    marks.mark_damaged(storage, ids[1], "block 3", seen=marks.seen(storage, ids[1]))
    rewrite(storage, f"{ids[1]}/{SHARD}")
    choice = choose_checkpoint(storage, selector)
    assert choice is not None
    assert choice.record.id == ids[1]


def state() -> dict[str, object]:
    return {"values": {"t": torch.arange(40_000)}}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_copy_that_arrives_after_it_was_tried_is_restored(
    read_only: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its size is right already, as of a file that is allocated first: only the bytes are not there yet."""
    with Checkpointer(tmp_path / "origin", state()) as ckpt:
        for step in (1, 2):
            record = ckpt.save(step).result(60.0)
    assert record is not None
    shutil.copytree(tmp_path / "origin", tmp_path / "run", ignore=shutil.ignore_patterns("lease-*"))
    shard = tmp_path / "run" / record.id / SHARD
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1000] + bytes(1000))
    caplog.set_level(logging.WARNING, "engine")
    with Checkpointer(tmp_path / "run", state(), read_only=read_only) as ckpt:
        assert ckpt.restore().step == 1  # type: ignore[union-attr]
        assert (tmp_path / "run" / record.id / DAMAGED).exists() is not read_only
        assert "skipping" not in caplog.text, "it was just said"
        assert ckpt.restore().step == 1  # type: ignore[union-attr]
        shard.write_bytes(raw)
        assert ckpt.restore().step == 2  # type: ignore[union-attr]
        assert [item.status for item in ckpt.list()] == ["committed", "committed"]
    assert caplog.text.count("falling back to the one before it") == 1


def test_what_changed_while_it_was_read_is_not_marked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the copy arrives between the read that failed and the mark."""
    with Checkpointer(tmp_path, state()) as ckpt:
        record = ckpt.save(1).result(60.0)
    assert record is not None
    shard = tmp_path / record.id / SHARD
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1000] + bytes(1000))
    real = Restorer._mark

    def arrives(self: Restorer, *about: Any) -> None:
        shard.write_bytes(raw)
        real(self, *about)

    monkeypatch.setattr(Restorer, "_mark", arrives)
    with Checkpointer(tmp_path, state()) as ckpt:
        with pytest.raises(DamagedError):
            ckpt.restore(record.id)
        assert ckpt.restore().step == 1  # type: ignore[union-attr]


def test_verify_takes_the_mark_from_what_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = LocalStorage(tmp_path)
    good, bad = (write_checkpoint(storage, sequence=n, rows=2) for n in (1, 2))
    flip_byte(tmp_path / bad / SHARD)
    for id in (good, bad):
        marks.mark_damaged(storage, id, "block 3")
    assert main(["verify", str(tmp_path), "--quick"]) == 0
    assert "nothing is wrong" not in capsys.readouterr().out
    assert statuses(storage) == {good: "damaged", bad: "damaged"}, "a quick look proves nothing"
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("its damage mark was removed") == 1
    assert statuses(storage) == {good: "committed", bad: "damaged"}


def test_verify_passes_over_what_is_retired_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (write_checkpoint(tmp_path, sequence=n, rows=2) for n in (1, 2))
    from engine.checkpoints import verify_command

    real = verify_command._verify

    def retired(storage: Storage, item: object, *rest: object) -> object:
        shutil.rmtree(tmp_path / one, ignore_errors=True)
        return real(storage, item, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(verify_command, "_verify", retired)
    assert main(["verify", str(tmp_path)]) == 0
    ran = capsys.readouterr()
    assert f"ok       {two}" in ran.out
    assert main(["verify", str(tmp_path / one)]) == 2, "what was named is missed"


def test_verify_does_not_take_a_file_that_is_gone_for_a_retired_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (write_checkpoint(tmp_path, sequence=n, rows=2) for n in (1, 2))
    real = LocalStorage.open_reader

    def gone(self: LocalStorage, path: str) -> object:
        if path == f"{one}/{SHARD}":
            (tmp_path / path).unlink(missing_ok=True)
        return real(self, path)

    monkeypatch.setattr(LocalStorage, "open_reader", gone)
    assert main(["verify", str(tmp_path)]) != 0
    assert two
