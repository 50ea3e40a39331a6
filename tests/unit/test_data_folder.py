"""data.folder: a folder that appears whole or not at all."""

import os
from pathlib import Path

import pytest

from data.errors import OutputError
from data.folder import staged_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(out: Path, text: str = "new", *, replace: bool = False) -> None:
    with staged_folder(
        out, incomplete="incomplete", may_replace=(lambda _: True) if replace else None
    ) as staging:
        (staging / "file").write_text(text)


def test_it_appears_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out, incomplete="incomplete") as staging:
        assert staging.parent == out.parent
        assert names(staging) == ["incomplete"]
        (staging / "file").write_text("x")
        assert not out.exists()
    assert names(out) == ["file"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with staged_folder(tmp_path / "out", incomplete="incomplete") as staging:
            (staging / "file").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []


def test_a_dead_runs_leftover_is_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.preparing"
    (leftover / "sub").mkdir(parents=True)
    (leftover / "old").write_text("half")
    write(tmp_path / "out")
    assert names(tmp_path / "out") == ["file"]
    assert names(tmp_path) == ["out"]


def test_a_living_run_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_folder(out, incomplete="incomplete") as staging:
        (staging / "file").write_text("first")
        with pytest.raises(OutputError, match=r"another process is preparing .*/out: wait"):
            write(out)
        assert names(staging) == ["file", "incomplete"]
    assert (out / "file").read_text() == "first"


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out)  # an empty folder is free
    with pytest.raises(OutputError, match=r"already exists: .* --force"):
        write(out, "second")
    assert (out / "file").read_text() == "new"
    with pytest.raises(OutputError, match="exists and is not a folder"):
        write(out / "file")
    assert names(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def overtaken() -> None:
        with staged_folder(out, incomplete="incomplete"):
            out.mkdir()
            (out / "mine").touch()

    with pytest.raises(OutputError, match="already exists"):
        overtaken()
    assert names(out) == ["mine"]


def test_replacing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    write(out, "new", replace=True)
    assert (out / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]
    with (
        pytest.raises(OutputError, match="contains more than a prepared dataset"),
        staged_folder(out, incomplete="incomplete", may_replace=lambda folder: folder != out),
    ):
        pass
    assert (out / "file").read_text() == "new"


def test_a_failed_replacement_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, "old")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source.name.endswith(".preparing"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OutputError, match=r"cannot write the dataset .*: No space left on device"):
        write(out, "new", replace=True)
    assert (out / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_run_killed_while_replacing_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    out.rename(tmp_path / ".out.replaced")  # the moment between the two renames
    with pytest.raises(OutputError, match="already exists"):
        write(out, "new")
    assert (out / "file").read_text() == "old"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert names(tmp_path / "real") == ["file"]
    assert (tmp_path / "link").is_symlink()


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write the dataset .*: Not a directory"):
        write(tmp_path / "file" / "sub" / "out")
