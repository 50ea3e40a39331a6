"""engine.checkpoints with two directories: `copy`, and `list --mirror`."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.directory import marks
from engine.directory.listing import list_checkpoints
from engine.lease.lease import Lease
from engine.storage.local import LocalStorage
from tests.support.checkpoints_program import Program, program
from tests.support.tiers import change_byte, second_storage, steps_in
from tests.support.tiny_checkpoint import write_checkpoint


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Program]:
    with program(capsys) as ready:
        yield ready


def id_of(sequence: int) -> str:
    return f"step-{sequence * 10:08d}-{sequence:08x}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three checkpoints and an attempt; 20 is the best."""
    root = tmp_path / "source"
    for sequence, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        write_checkpoint(root, sequence=sequence, world_size=2, metrics={"val_loss": loss})
    write_checkpoint(root, sequence=9, commit=False)
    return root


@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_copy_a_directory(run: Program, source: Path, tmp_path: Path, kind: str) -> None:
    second = second_storage(kind, tmp_path)
    ran = run("copy", source, second.uri)
    assert ran.code == 0
    assert ran.err == "" or kind == "memory", "a store says whether it can create exclusively"
    assert [line.split()[:2] for line in ran.out.splitlines()] == [["copied", id_of(n)] for n in (3, 2, 1)]
    assert "173 kB in" in ran.out
    assert steps_in(second) == [10, 20, 30]
    again = run("copy", source, second.uri)
    assert [line.split()[0] for line in again.out.splitlines()] == ["present"] * 3
    assert "nothing was sent" in again.out
    back = run("copy", second.uri, tmp_path / "back")
    assert back.code == 0
    for path in sorted(source.glob("step-*[123]/*")):
        assert (tmp_path / "back" / path.parent.name / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("to", ["there", "there/{}"])
def test_copy_one_checkpoint(run: Program, source: Path, tmp_path: Path, to: str) -> None:
    assert run("copy", source / id_of(2), tmp_path / to.format(id_of(2))).code == 0
    assert [item.id for item in list_checkpoints(LocalStorage(tmp_path / "there"))] == [id_of(2)]
    assert run("copy", source, tmp_path / "best", "--select=best").code == 0
    assert steps_in(LocalStorage(tmp_path / "best")) == [20]


def test_copy_mends_what_has_changed(run: Program, source: Path, tmp_path: Path) -> None:
    target = LocalStorage(tmp_path / "there")
    run("copy", source, target.uri)
    change_byte(target, f"{id_of(1)}/shard-00001.safetensors")
    ran = run("copy", source, target.uri)
    assert ran.code == 0
    assert "86 kB of 173 kB" in ran.out
    assert steps_in(target) == [10, 20, 30]


def test_copy_leaves_out_what_is_damaged_and_says_so(run: Program, source: Path, tmp_path: Path) -> None:
    change_byte(LocalStorage(source), f"{id_of(2)}/shard-00000.safetensors")
    marks.mark_damaged(LocalStorage(source), id_of(1), "block 3 is bad")
    ran = run("copy", source, tmp_path / "there")
    assert ran.code == 2
    assert steps_in(LocalStorage(tmp_path / "there")) == [30]
    assert ran.err.startswith("error: not everything was copied: ")
    assert "block 3 is bad" in ran.err
    assert "(and 1 more)" in ran.err


def test_copy_that_is_stopped_leaves_nothing_listed_and_goes_on(
    run: Program, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = LocalStorage(tmp_path / "there")
    real = LocalStorage.write_file

    def stopped(self: LocalStorage, path: str, data: bytes) -> None:
        if path.endswith("shard-00001.json") and self.uri == target.uri:
            signal.raise_signal(signal.SIGTERM)
        real(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write_file", stopped)
        with pytest.raises(SystemExit) as stop:
            run("copy", source / id_of(1), target.uri)
    assert stop.value.code == 128 + signal.SIGTERM
    assert [item.status for item in list_checkpoints(target)] == ["partial"]
    assert run("copy", source / id_of(1), target.uri).code == 0
    assert steps_in(target) == [10]


def test_copy_of_nothing_and_to_nowhere(run: Program, source: Path, tmp_path: Path) -> None:
    run("copy", tmp_path / "nowhere", tmp_path / "there").refused(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    run("copy", tmp_path / "empty", tmp_path / "there").refused("nothing to copy")
    run("copy", source / id_of(9), tmp_path / "there").refused("not a committed checkpoint")
    run("copy", source, source).refused("both source and target")
    run("copy", source, "").refused("empty")
    run("copy", source).refused("DIR_TO")
    run("copy", source / id_of(1), tmp_path / "there", "--select=best").refused("omit --select")
    run("copy", source, tmp_path / "there", "--select=step:7").refused("step:30")
    assert not (tmp_path / "there").exists()
    write_checkpoint(tmp_path / "other", sequence=1, seed=5)
    run("copy", source / id_of(1), tmp_path / "other").refused("a different checkpoint with the same name")


def test_copy_into_a_directory_that_a_run_writes_to(run: Program, source: Path, tmp_path: Path) -> None:
    target = LocalStorage(tmp_path / "there")
    target.make_dir()
    with Lease.acquire(target, run_id="training"):
        run("copy", source, target.uri).refused("is held by", str(target.uri))


def test_list_shows_both_tiers_and_what_is_pending(run: Program, source: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    run("copy", source, mirror)
    write_checkpoint(source, sequence=4, world_size=2)
    shutil.rmtree(source / id_of(1))
    change_byte(LocalStorage(mirror), f"{id_of(3)}/manifest.json", at=40)
    ran = run("list", source, "--mirror", mirror)
    assert ran.code == 0
    rows = {line.split()[-1]: line.split() for line in ran.out.splitlines()[1:6]}
    assert rows[id_of(1)][-3:-1] == ["-", "committed"]
    assert rows[id_of(2)][-3:-1] == ["committed", "committed"]
    assert rows[id_of(3)][-3:-1] == ["committed", "owed"]
    assert rows[id_of(4)][-3:-1] == ["committed", "owed"]
    assert rows[id_of(9)][-3:-1] == ["partial", "-"]
    assert ran.out.splitlines()[-1] == f"2 checkpoints, 346 kB, are not yet copied to {mirror}"
    entries = {
        entry["step"]: entry
        for entry in run("list", source, "--mirror", mirror, "--json").json["checkpoints"]
    }
    assert (entries[10]["local"], entries[10]["mirror"]) == (None, "committed")
    assert entries[10]["path"] == str(mirror / id_of(1))
    assert (entries[40]["local"], entries[40]["mirror"]) == ("committed", "owed")
    assert entries[40]["roles"][0] == "latest"


def test_list_follows_the_runs_own_frequency(run: Program, tmp_path: Path) -> None:
    for sequence in (1, 2):
        write_checkpoint(tmp_path / "a", sequence=sequence, config={"keep_checkpoints": 3, "mirror_freq": 20})
    (tmp_path / "b").mkdir()
    ran = run("list", tmp_path / "a", "--mirror", tmp_path / "b")
    last = ran.out.splitlines()[-1]
    assert re.fullmatch(rf"1 checkpoint, .*, is not yet copied to {tmp_path / 'b'}", last)


def test_list_of_a_lost_node(run: Program, source: Path, tmp_path: Path) -> None:
    ran = run("list", tmp_path / "lost", "--mirror", source)
    assert ran.code == 0
    assert id_of(3) in ran.out
    assert ran.out.splitlines()[-1] == f"{source} is up to date"
    assert run("list", tmp_path / "lost", "--mirror", tmp_path / "none").out == (
        f"no checkpoints in {tmp_path / 'lost'} and {tmp_path / 'none'}\n"
    )
