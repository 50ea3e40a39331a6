"""What choosing a checkpoint reads: on a store each read is a round trip, and a manifest may be megabytes."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest

from engine.directory import marks
from engine.directory.listing import Directory, list_checkpoints
from engine.errors import DamagedError, SelectorError
from engine.format.names import MANIFEST
from engine.restore.choice import choose_checkpoint, in_mirror
from engine.storage.base import Entry, Heads
from engine.storage.local import LocalStorage
from tests.support.damage import flip_byte
from tests.support.tiny_checkpoint import write_checkpoint


class Counted(LocalStorage):
    """Like a store: its listing leaves out the shards, and reads are made side by side. Counts both."""

    is_local = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._plain = LocalStorage(root)
        self.asked: Counter[str] = Counter()
        self._counting = threading.Lock()

    def list_heads(self) -> Heads:
        self._count("list")
        tree = {
            name: {file: size for file, size in files.items() if not file.startswith("shard-")}
            for name, files in self._plain.list_tree().items()
        }
        return Heads(tree, whole=False)

    def list_dir(self, path: str = "") -> list[Entry]:
        if path:
            self._count(f"list {path}")
        return super().list_dir(path)

    def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
        self._count(path)
        return super().read_bytes(path, max_bytes=max_bytes)

    def _count(self, what: str) -> None:
        with self._counting:
            self.asked[what] += 1


def manifests(*ids: str) -> dict[str, int]:
    """One listing, and one read of each of these manifests."""
    return {"list": 1} | {f"{id}/{MANIFEST}": 1 for id in ids}


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    """Four checkpoints, oldest first; the third has the lowest loss."""
    losses = (4.0, 3.0, 1.0, 2.0)
    return [
        write_checkpoint(tmp_path / "here", sequence=n, rows=1, metrics={"val_loss": loss})
        for n, loss in enumerate(losses, start=1)
    ]


@pytest.fixture
def here(ids: list[str], tmp_path: Path) -> Counted:
    return Counted(tmp_path / "here")


@pytest.fixture
def there(ids: list[str], tmp_path: Path) -> Counted:
    """A mirror with copies of the last two."""
    for id in ids[2:]:
        shutil.copytree(tmp_path / "here" / id, tmp_path / "there" / id)
    return Counted(tmp_path / "there")


def chosen(storage: Counted, selector: str, **more: object) -> str:
    choice = choose_checkpoint(storage, selector, **more)  # type: ignore[arg-type]
    assert choice is not None
    assert choice.manifest.id == choice.record.id
    return choice.record.id


def test_latest_reads_each_manifest_once_and_nothing_else(here: Counted, ids: list[str]) -> None:
    """Not that of the chosen one again, nor the size of what another run is writing."""
    for name in ("step-00000999-00000009", "dead-step-00000998-00000008"):
        here.make_dir(name)
    here.write_file("step-00000999-00000009/shard-00000.safetensors", b"12345")
    here.write_file("dead-step-00000998-00000008/shard-00000.safetensors", b"12345")
    assert chosen(here, "latest") == ids[3]
    assert here.asked == manifests(*ids)


def test_after_going_back_latest_is_not_the_highest_step(tmp_path: Path) -> None:
    """Why names alone do not decide it: step 300, then on from step 100."""
    for sequence, step in ((1, 100), (2, 200), (3, 300), (4, 110)):
        write_checkpoint(tmp_path, sequence=sequence, step=step, rows=1)
    choice = choose_checkpoint(Counted(tmp_path), "latest")
    assert choice is not None
    assert choice.record.step == 110


@pytest.mark.parametrize("selector", ["step:30", "id"])
def test_a_name_that_decides_leaves_the_others_unread(here: Counted, ids: list[str], selector: str) -> None:
    assert chosen(here, ids[2] if selector == "id" else selector) == ids[2]
    assert here.asked == manifests(ids[2])


@pytest.mark.parametrize(("selector", "position"), [("best", 2), ("backup", 2)])
def test_what_compares_reads_them_all(here: Counted, ids: list[str], selector: str, position: int) -> None:
    assert chosen(here, selector) == ids[position]
    again = {f"{ids[position]}/{MANIFEST}": 2}  # only the newest one's is kept
    assert here.asked == manifests(*ids) | again


def test_what_was_tried_in_vain_is_not_read_again(here: Counted, ids: list[str]) -> None:
    assert chosen(here, "latest", passed_over={ids[3]}) == ids[2]
    assert here.asked == manifests(*ids[:3])


def test_a_mark_is_read_if_it_explains_why_a_newer_one_is_passed_over(
    here: Counted, ids: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    marks.mark_damaged(here, ids[0], "of no interest")
    marks.mark_damaged(here, ids[3], "block 3 has changed")
    assert chosen(here, "latest") == ids[2]
    assert here.asked == manifests(*ids) | {f"{ids[3]}/damaged.json": 1}
    assert caplog.messages == [f"skipping {ids[3]}, which is damaged: block 3 has changed"]


def test_of_a_mirror_only_what_is_not_whole_here_is_read(
    here: Counted, there: Counted, ids: list[str], tmp_path: Path
) -> None:
    newest = write_checkpoint(tmp_path / "there", sequence=5, rows=1)
    flip_byte(tmp_path / "here" / ids[2] / MANIFEST)
    choice = choose_checkpoint(here, "latest", mirror=there)
    assert choice is not None
    assert (choice.record.id, choice.tier) == (newest, "mirror")
    assert here.asked == manifests(*ids)
    assert there.asked == manifests(ids[2], newest)


def test_of_a_mirror_that_is_behind_nothing_is_read(here: Counted, there: Counted, ids: list[str]) -> None:
    assert chosen(here, "latest", mirror=there) == ids[3]
    assert there.asked == manifests()
    assert chosen(here, ids[1], mirror=there) == ids[1]
    assert there.asked == manifests(), "an id that lies here does not even list it"


def test_a_copy_that_failed_sends_to_the_other_tier(here: Counted, there: Counted, ids: list[str]) -> None:
    choice = choose_checkpoint(here, "latest", mirror=there, passed_over={ids[3]})
    assert choice is not None
    assert (choice.record.id, choice.tier) == (ids[3], "mirror")
    assert (here.asked, there.asked) == (manifests(*ids[:3]), manifests(ids[3]))
    both = {ids[3], in_mirror(ids[3])}
    assert chosen(here, "latest", mirror=there, passed_over=both) == ids[2]


def test_what_answers_to_nothing_is_told_with_all_there_is(
    here: Counted, there: Counted, ids: list[str]
) -> None:
    """Then a read more or less matters to nobody; still, none is made twice."""
    with pytest.raises(SelectorError, match=r"step:40 \(latest\); step:30 \(backup, best\); step:20"):
        chosen(here, "step:999", mirror=there)
    assert here.asked == manifests(*ids)
    for id in ids:
        marks.mark_damaged(here, id, f"reason {id}")
    for id in ids[2:]:
        marks.mark_damaged(there, id, f"reason {id}")
    with pytest.raises(DamagedError) as caught:
        choose_checkpoint(here, "latest", mirror=there)
    for id in ids:
        assert f"{id}: reason {id}" in str(caught.value)


def test_a_listing_asks_nothing_twice(here: Counted, ids: list[str]) -> None:
    marks.mark_damaged(here, ids[1], "block 3")
    listed = list_checkpoints(here)
    assert [item.reason for item in listed] == ["", "block 3", "", ""]
    assert here.asked == manifests(*ids) | {f"{ids[1]}/damaged.json": 1}
    directory = Directory(here)
    assert directory.everything() == directory.everything() == listed
    assert here.asked[f"{ids[0]}/{MANIFEST}"] == 2, "once for each listing"
