"""Which checkpoint a selector means, and what is said when there is none. Works on manifests alone."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from engine.directory import marks
from engine.errors import DamagedError, NewerFormatError, SelectorError, StorageUnavailableError
from engine.restore.choice import choose_checkpoint
from engine.storage.local import LocalStorage
from tests.support.damage import flip_byte
from tests.support.tiny_checkpoint import write_checkpoint


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    """Three checkpoints, oldest first; the second has the lowest loss."""
    losses = (3.0, 1.0, 2.0)
    return [
        write_checkpoint(tmp_path, sequence=n, rows=2, metrics={"val_loss": loss})
        for n, loss in enumerate(losses, start=1)
    ]


def chosen(root: Path, selector: str, **more: object) -> str | None:
    choice = choose_checkpoint(LocalStorage(root), selector, **more)  # type: ignore[arg-type]
    if choice is None:
        return None
    assert choice.manifest.id == choice.record.id
    return choice.record.id


@pytest.mark.parametrize(
    ("selector", "position"), [("latest", 2), ("backup", 1), ("best", 1), ("step:10", 0)]
)
def test_selectors(selector: str, position: int, ids: list[str], tmp_path: Path) -> None:
    assert chosen(tmp_path, selector) == ids[position]


def test_an_id_is_a_selector(ids: list[str], tmp_path: Path) -> None:
    assert chosen(tmp_path, ids[0]) == ids[0]


def test_of_ones_own_directory_there_is_no_target(ids: list[str], tmp_path: Path) -> None:
    choice = choose_checkpoint(LocalStorage(tmp_path), "latest")
    assert choice is not None
    assert (choice.target, choice.name) == ("", ids[2])


@pytest.mark.parametrize("name", ["same", "my-copy"])
def test_a_path_says_where_it_is_and_what_it_is_called(name: str, ids: list[str], tmp_path: Path) -> None:
    name = ids[0] if name == "same" else name
    shutil.copytree(tmp_path / ids[0], tmp_path / "elsewhere" / name)
    choice = choose_checkpoint(LocalStorage(tmp_path), str(tmp_path / "elsewhere" / name))
    assert choice is not None
    assert (choice.target, choice.name) == (str(tmp_path / "elsewhere"), name)
    assert choice.record.id == ids[0]
    assert choice.record.path == str(tmp_path / "elsewhere" / name)


@pytest.mark.parametrize("where", ["nothing-here", "folder"])
def test_a_path_without_a_manifest(where: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SelectorError, match=r"no manifest\.json"):
        chosen(tmp_path, str(tmp_path / where))


def test_only_latest_on_nothing_is_none(tmp_path: Path) -> None:
    assert chosen(tmp_path, "latest") is None
    assert chosen(tmp_path / "does-not-exist", "latest") is None
    (tmp_path / "lease-00000001").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert chosen(tmp_path, "latest") is None, "what is no attempt does not count"
    with pytest.raises(SelectorError):
        chosen(tmp_path, "best")


def test_latest_walks_back_past_what_failed_just_now(ids: list[str], tmp_path: Path) -> None:
    assert chosen(tmp_path, "latest", passed_over={ids[2]}) == ids[1]
    assert chosen(tmp_path, "latest", passed_over={ids[2], ids[1]}) == ids[0]
    with pytest.raises(DamagedError, match="failed to restore just now"):
        chosen(tmp_path, "latest", passed_over=set(ids))


def test_latest_passes_over_what_is_marked_or_visibly_damaged_and_says_so(
    ids: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    marks.mark_damaged(LocalStorage(tmp_path), ids[2], "block 3 has changed")
    (tmp_path / ids[1] / "shard-00000.safetensors").write_bytes(b"short")
    assert chosen(tmp_path, "latest") == ids[0]
    assert f"skipping {ids[2]}, which is damaged: block 3 has changed" in caplog.text
    assert f"skipping {ids[1]}" in caplog.text


def test_an_older_damaged_one_is_not_mentioned(
    ids: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marks.mark_damaged(LocalStorage(tmp_path), ids[0], "old damage")
    assert chosen(tmp_path, "latest") == ids[2]
    assert not caplog.messages


def test_only_damaged_and_unfinished_ones(ids: list[str], tmp_path: Path) -> None:
    flip_byte(tmp_path / ids[0] / "manifest.json")
    marks.mark_damaged(LocalStorage(tmp_path), ids[1], "block 3 has changed")
    (tmp_path / ids[2] / "manifest.json").unlink()
    with pytest.raises(DamagedError) as caught:
        chosen(tmp_path, "latest")
    message = str(caught.value)
    assert "no whole checkpoint" in message
    assert "Nothing was deleted" in message
    for id, reason in zip(ids, ("manifest", "block 3 has changed", "no manifest"), strict=True):
        assert id in message
        assert reason in message


def test_a_newer_format_is_not_nothing(ids: list[str], tmp_path: Path) -> None:
    for id in ids[1:]:
        shutil.rmtree(tmp_path / id)
    path = tmp_path / ids[0] / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version":1', b'"format_version":99'))
    with pytest.raises((DamagedError, NewerFormatError), match=r"99|newer"):
        chosen(tmp_path, "latest")


def test_an_outage_is_not_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(storage: LocalStorage) -> None:
        raise StorageUnavailableError("the store is down")

    monkeypatch.setattr(LocalStorage, "list_tree", down)
    with pytest.raises(StorageUnavailableError):
        chosen(tmp_path, "latest")
