"""The trainer's side of a mirror: where a run begins, what is said, what a checkpoint may not say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, SelectorError, StorageUnavailableError
from engine.restore.choice import choose_checkpoint, in_mirror
from engine.run.config import TrainConfig, from_json, to_json
from engine.run.console import checkpoint_line
from engine.run.start import Restart, Start, find_start
from engine.run.trainer import time_for_the_mirror
from engine.storage.local import LocalStorage
from tests.support.damage import flip_byte
from tests.support.tiny_checkpoint import write_checkpoint


def begin(folder: Path, mirror: Path | str, *, restart: Restart | None = None, **flags: Any) -> Start:
    config = TrainConfig(checkpoint_dir=str(folder), mirror=str(mirror), **flags)
    return find_start(config, directory_given=True, restart=restart or Restart())


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Steps 10 and 20."""
    for sequence, loss in ((1, 4.0), (2, 3.0)):
        write_checkpoint(
            tmp_path / "local", sequence=sequence, metrics={"val_loss": loss}, config={"launch": "ours"}
        )
    return tmp_path / "local"


@pytest.fixture
def mirror(tmp_path: Path, local: Path) -> Path:
    """The same, and step 30, the best one."""
    shutil.copytree(local, tmp_path / "mirror")
    write_checkpoint(tmp_path / "mirror", sequence=3, metrics={"val_loss": 1.0})
    return tmp_path / "mirror"


def test_latest_is_the_newest_of_both(local: Path, mirror: Path) -> None:
    start = begin(local, mirror, resume="latest")
    assert (start.selector, start.home, start.checkpoint_dir) == ("latest", str(mirror), str(local))
    assert start.sentence.endswith(f"step 30, from {mirror}/{start.name}")
    assert start.best_val_loss == 1.0


def test_the_local_copy_is_nearer(local: Path, mirror: Path) -> None:
    start = begin(local, mirror, resume="step:20")
    assert start.home == str(local)


def test_a_lost_node_begins_with_the_mirror(tmp_path: Path, mirror: Path) -> None:
    start = begin(tmp_path / "lost", mirror, resume="latest")
    assert (start.home, start.checkpoint_dir) == (str(mirror), str(tmp_path / "lost"))


def test_nothing_in_either_is_a_fresh_start(tmp_path: Path) -> None:
    assert begin(tmp_path / "a", tmp_path / "b", resume="latest").selector is None
    with pytest.raises(SelectorError):
        begin(tmp_path / "a", tmp_path / "b", resume="best")


def test_a_run_is_not_mixed_into_a_mirror_that_holds_another(tmp_path: Path, mirror: Path) -> None:
    with pytest.raises(ConfigError, match=f"{mirror} holds 3 checkpoints.*--resume latest"):
        begin(tmp_path / "new", mirror)
    assert begin(tmp_path / "new", mirror, new_run=True).selector is None


def test_an_outage_of_the_mirror_is_not_an_empty_mirror(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest one may be there, and only there."""
    out_of_reach(monkeypatch, "mirror")
    with pytest.raises(StorageUnavailableError):
        begin(local, local.parent / "mirror", resume="latest")


def out_of_reach(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = LocalStorage.list_tree

    def list_tree(self: LocalStorage) -> dict[str, dict[str, int]]:
        if self.uri.endswith(f"/{name}"):
            raise StorageUnavailableError("503")
        return real(self)

    monkeypatch.setattr(LocalStorage, "list_tree", list_tree)


def test_a_restarted_worker_goes_on_although_the_mirror_is_out_of_reach(
    local: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_reach(monkeypatch, "mirror")
    start = begin(local, mirror, restart=Restart(1, "ours"), resume="latest")
    assert start.selector is not None
    choice = choose_checkpoint(LocalStorage(local), start.selector, mirror=LocalStorage(mirror))
    assert choice is not None
    assert (choice.tier, choice.record.step) == ("local", 20)
    with pytest.raises(StorageUnavailableError):
        choose_checkpoint(LocalStorage(local), "latest", mirror=LocalStorage(mirror))


def test_choosing_takes_the_other_copy_of_what_was_tried_in_vain(local: Path, mirror: Path) -> None:
    here, there = LocalStorage(local), LocalStorage(mirror)
    passed_over: set[str] = set()
    tried = []
    for _ in range(5):
        choice = choose_checkpoint(here, "latest", passed_over=passed_over, mirror=there)
        assert choice is not None
        tried.append((choice.record.step, choice.tier))
        passed_over.add(in_mirror(choice.record.id) if choice.tier == "mirror" else choice.record.id)
    assert tried == [(30, "mirror"), (20, "local"), (20, "mirror"), (10, "local"), (10, "mirror")]


def test_one_that_is_listed_as_damaged_here_is_taken_from_the_mirror(local: Path, mirror: Path) -> None:
    (hurt,) = local.glob("step-00000020-*")
    flip_byte(hurt / "manifest.json", 50)
    choice = choose_checkpoint(LocalStorage(local), "step:20", mirror=LocalStorage(mirror))
    assert choice is not None
    assert choice.tier == "mirror"


def test_a_checkpoint_never_says_where_to_mirror_to() -> None:
    """Loading somebody's checkpoint would send the data to them."""
    stored = to_json(TrainConfig(mirror="s3://mine/run", mirror_freq=500))
    assert "mirror" not in stored
    assert stored["mirror_freq"] == 500
    config = from_json({**stored, "mirror": "s3://theirs/run"}, TrainConfig())
    assert (config.mirror, config.mirror_freq) == (None, 500)


@pytest.mark.parametrize("flags", [{"mirror": ""}, {"mirror_freq": -1}], ids=str)
def test_flags_that_cannot_work(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(flags))}"):
        TrainConfig(**flags)


@pytest.mark.parametrize(("left", "secs"), [(None, None), (25.0, 19.0), (6.0, 0.0), (0.0, 0.0)])
def test_the_mirror_gets_the_rest_of_the_grace_time(left: float | None, secs: float | None) -> None:
    assert time_for_the_mirror(left) == secs


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (
            {
                "event": "mirror_copied",
                "step": 3,
                "bytes": 1_490_000_000,
                "sent_bytes": 1_490_000_000,
                "secs": 12.5,
                "owed": 0,
                "path": "s3://b/run/step-3",
            },
            "mirror: step 3 copied, 1.49 GB in 12.50 s -> s3://b/run/step-3",
        ),
        (
            {
                "event": "mirror_copied",
                "step": 3,
                "bytes": 2_000_000,
                "sent_bytes": 1_000_000,
                "secs": 1.0,
                "owed": 2,
                "path": "/m/step-3",
            },
            "mirror: step 3 copied, 1 MB of 2 MB in 1.00 s, 2 pending -> /m/step-3",
        ),
        (
            {"event": "mirror_failed", "cause": "503 Slow Down", "owed": 2, "path": "s3://b/run"},
            "mirror: FAILED, 2 pending: 503 Slow Down",
        ),
    ],
    ids=["whole", "part", "failed"],
)
def test_the_line_for_the_mirror(event: dict[str, Any], said: str) -> None:
    assert checkpoint_line(event) == said
