"""Where a run begins: from what the directory holds, the flags, and torchrun's restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, SelectorError, StorageError
from engine.run.config import TrainConfig
from engine.run.start import Restart, Start, find_start
from tests.support.tiny_checkpoint import write_checkpoint


def begin(folder: Path, *, restart: Restart | None = None, given: bool = True, **flags: Any) -> Start:
    config = TrainConfig(checkpoint_dir=str(folder), **flags)
    return find_start(config, directory_given=given, restart=restart or Restart())


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Steps 10, 20 and 30; the middle one is best."""
    for sequence, loss in ((1, 4.0), (2, 3.0), (3, 3.5)):
        config = {"lr": sequence / 1000, "launch": "ours"}
        write_checkpoint(
            tmp_path,
            sequence=sequence,
            metrics={"val_loss": loss},
            config=config,
            objects={"loader": {"fingerprint": "f"}},
        )
    return tmp_path


def break_all(folder: Path) -> None:
    for manifest in folder.glob("*/manifest.json"):
        manifest.write_bytes(b"{}")


@pytest.mark.parametrize("resume", [None, "latest"])
def test_an_empty_directory_is_a_fresh_start(tmp_path: Path, resume: str | None) -> None:
    start = begin(tmp_path / "none", resume=resume)
    assert start.selector is None
    assert start.stored == {}
    assert "step 0" in start.sentence
    assert ("fresh" in start.sentence) == (resume == "latest")


@pytest.mark.parametrize(
    ("resume", "step"), [("latest", 30), ("backup", 20), ("best", 20), ("step:10", 10)], ids=str
)
def test_a_selector_gives_the_checkpoints_own_configuration(three: Path, resume: str, step: int) -> None:
    start = begin(three, resume=resume)
    assert start.selector == resume
    assert start.stored["lr"] == step / 10_000
    assert start.world_size == 1
    assert start.fingerprint == "f"
    assert start.best_val_loss == 3.0, "the directory's, not that checkpoint's"
    assert f"step {step}" in start.sentence


@pytest.mark.parametrize("resume", ["backup", "best", "epoch:1", "step:4", "yesterday"])
def test_any_other_selector_that_finds_nothing_is_an_error(tmp_path: Path, resume: str) -> None:
    with pytest.raises(SelectorError, match=resume):
        begin(tmp_path, resume=resume)


def test_the_error_lists_what_there_is(three: Path) -> None:
    with pytest.raises(SelectorError, match=r"step:30 \(latest.*step:20.*best.*step:10"):
        begin(three, resume="step:4")


def test_checkpoints_without_a_word_about_them_are_not_mixed_up(three: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 checkpoints, up to step 30.*--resume latest.*--new_run"):
        begin(three)


def test_a_new_run_begins_beside_them(three: Path) -> None:
    start = begin(three, new_run=True)
    assert start.selector is None
    assert start.best_val_loss is None, "another run's losses are not this run's"


@pytest.mark.parametrize(("resume", "error"), [(None, ConfigError), ("latest", SelectorError)])
def test_damaged_checkpoints_are_not_nothing(three: Path, resume: str | None, error: type[Exception]) -> None:
    break_all(three)
    with pytest.raises(error, match="damaged" if resume else "3 checkpoints"):
        begin(three, resume=resume)


def test_a_damaged_one_that_was_asked_for_is_named_with_the_reason(three: Path) -> None:
    (shard,) = three.glob("step-00000020-*/shard-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SelectorError, match=r"step-00000020-\w+ is damaged \(shard-00000.safetensors"):
        begin(three, resume="step:20")
    assert begin(three, resume="backup").stored["lr"] == 0.001


def test_an_attempt_without_a_commit_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, commit=False)
    assert begin(tmp_path).selector is None, "there is nothing to mix up with"
    with pytest.raises(SelectorError, match=r"partial.*--new_run"):
        begin(tmp_path, resume="latest")
    assert begin(tmp_path, new_run=True).selector is None


def test_an_outage_is_not_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        begin(tmp_path / "file", resume="latest")


@pytest.mark.parametrize("given", [False, True], ids=["its own directory", "another directory"])
def test_a_path_brings_its_directory_unless_one_is_given(three: Path, tmp_path: Path, given: bool) -> None:
    (path,) = three.glob("step-00000010-*")
    elsewhere = tmp_path / "elsewhere"
    start = begin(elsewhere, resume=str(path), given=given)
    assert start.checkpoint_dir == str(elsewhere if given else three)
    assert (start.home, start.name) == (str(three), path.name)
    assert start.selector == str(path)
    assert start.stored["lr"] == 0.001
    assert start.best_val_loss == (None if given else 3.0)


def test_a_path_to_a_directory_of_checkpoints_says_what_to_type(three: Path) -> None:
    with pytest.raises(SelectorError, match=f"--checkpoint_dir {three} --resume latest"):
        begin(three, resume=f"{three}/")


def test_a_path_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(SelectorError, match=r"no checkpoint at .*/no/such/place"):
        begin(tmp_path, resume="/no/such/place")


OURS, THEIRS = Restart(2, "ours"), Restart(2, "theirs")


@pytest.mark.parametrize("flags", [{}, {"resume": "step:10"}, {"new_run": True}], ids=str)
def test_a_restarted_worker_takes_up_its_own_latest(three: Path, flags: dict[str, Any]) -> None:
    start = begin(three, restart=OURS, **flags)
    assert start.selector == "latest"
    assert start.stored["lr"] == 0.003
    assert "restart 2" in start.sentence


def test_a_restarted_worker_looks_where_its_path_pointed(three: Path, tmp_path: Path) -> None:
    (path,) = three.glob("step-00000010-*")
    start = begin(tmp_path / "not given", restart=OURS, resume=str(path), given=False)
    assert (start.checkpoint_dir, start.selector) == (str(three), "latest")


def test_a_restarted_worker_that_never_saved_does_what_its_flags_say(three: Path) -> None:
    """Otherwise a run that was refused, or sent to step 10, would take up another run after its restart."""
    with pytest.raises(ConfigError, match="--new_run"):
        begin(three, restart=THEIRS)
    assert begin(three, restart=THEIRS, resume="step:10").selector == "step:10"
    assert begin(three, restart=THEIRS, new_run=True).selector is None


def test_a_restart_before_the_first_commit_begins_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, commit=False)
    assert begin(tmp_path, restart=OURS, resume="latest").selector is None


def test_a_launch_without_a_name_counts_as_the_same(three: Path) -> None:
    assert begin(three, restart=Restart(1, None)).selector == "latest"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Restart()),
        ({"TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_RUN_ID": "a1"}, Restart(3, "a1")),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "none"}, Restart(1, None)),
        ({"TORCHELASTIC_RESTART_COUNT": "", "TORCHELASTIC_RUN_ID": ""}, Restart()),
    ],
    ids=str,
)
def test_what_torchrun_says(environ: dict[str, str], expected: Restart) -> None:
    assert Restart.from_environ(environ) == expected
