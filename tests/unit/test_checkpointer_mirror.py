"""A Checkpointer with a mirror: saves never wait for it, and a restore takes the newest intact checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer, Retention
from engine.directory.listing import list_checkpoints
from engine.errors import (
    ConfigError,
    DamagedError,
    DirectoryHeldError,
    SelectorError,
    StorageUnavailableError,
)
from engine.lease.lease import Lease
from engine.mirror.uploader import at_most
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from tests.support.controlled import DEADLINE_SECS, ControlledStorage
from tests.support.damage import flip_byte
from tests.support.tiers import change_byte, second_storage, steps_in

State = dict[str, Any]


def state(value: float = 0.0) -> State:
    return {"values": {"t": torch.full((30_000,), value), "n": int(value)}}


def value_of(made: State) -> float:
    assert bool((made["values"]["t"] == made["values"]["n"]).all())
    return float(made["values"]["n"])


@pytest.fixture(params=["directory", "memory"])
def second(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return second_storage(request.param, tmp_path)


def run(folder: Path, second: Storage | str, *steps: int, **more: Any) -> list[dict[str, Any]]:
    """A run that saves these steps, each with its number as value; returns its events."""
    events: list[dict[str, Any]] = []
    made = state()
    uri = second if isinstance(second, str) else second.uri
    with Checkpointer(folder, made, mirror=uri, on_event=events.append, **more) as checkpointer:
        for step in steps:
            made["values"]["t"].fill_(step)
            made["values"]["n"] = step
            checkpointer.save(step).result(DEADLINE_SECS)
    return events


def restored(folder: Path, second: Storage, selector: str = "latest") -> float | None:
    made = state(-1)
    with Checkpointer(folder, made, mirror=second.uri, read_only=True) as checkpointer:
        record = checkpointer.restore(selector)
    assert record is None or record.step == value_of(made)
    return None if record is None else value_of(made)


def test_every_save_arrives_and_each_tier_keeps_its_own(tmp_path: Path, second: Storage) -> None:
    local = LocalStorage(tmp_path / "local")
    events = run(tmp_path / "local", second, 10, 20, 30, retention=Retention(rolling=2))
    assert steps_in(local) == steps_in(second) == [20, 30]
    assert {event["step"] for event in events if event["event"] == "mirror_copied"} >= {20, 30}
    assert Lease.acquire(second, run_id="next").epoch == 2, "it was let go of"


def test_the_newest_of_both_counts_and_the_nearer_copy_is_read(tmp_path: Path, second: Storage) -> None:
    run(tmp_path / "local", second, 10, 20)
    assert restored(tmp_path / "local", second) == 20
    # An older local directory, as of another node: the mirror has gone on.
    shutil.copytree(tmp_path / "local", tmp_path / "older")
    run(tmp_path / "local", second, 30)
    assert restored(tmp_path / "older", second) == 30
    for shard in [entry for entry in second.list_dir() if entry.name.startswith("step-00000020")]:
        change_byte(second, f"{shard.name}/shard-00000.safetensors")
    assert restored(tmp_path / "older", second, "step:20") == 20, "read locally"


def test_a_lost_node_goes_on_from_the_mirror_alone(tmp_path: Path, second: Storage) -> None:
    run(tmp_path / "local", second, 10, 20)
    shutil.rmtree(tmp_path / "local")
    assert restored(tmp_path / "local", second) == 20
    made = state()
    with Checkpointer(tmp_path / "local", made, mirror=second.uri) as checkpointer:
        assert checkpointer.restore("latest") is not None
        record = checkpointer.save(30).result(DEADLINE_SECS)
    assert record is not None
    assert record.sequence == 3, "above every number of the mirror"
    assert steps_in(second) == [10, 20, 30]
    parents = [item.record.parent for item in list_checkpoints(second) if item.record]
    assert parents[2] == [item.id for item in list_checkpoints(second)][1]


@pytest.mark.parametrize("selector", ["latest", "step:20", "backup"])
def test_a_damaged_local_copy_is_read_from_the_mirror(tmp_path: Path, second: Storage, selector: str) -> None:
    run(tmp_path / "local", second, *((10, 20, 30) if selector == "backup" else (10, 20)))
    (hurt,) = (tmp_path / "local").glob("step-00000020-*")
    flip_byte(hurt / "shard-00000.safetensors", -5)
    assert restored(tmp_path / "local", second, selector) == 20


def test_when_both_copies_are_damaged_latest_walks_back(tmp_path: Path, second: Storage) -> None:
    run(tmp_path / "local", second, 10, 20)
    (hurt,) = (tmp_path / "local").glob("step-00000020-*")
    flip_byte(hurt / "shard-00000.safetensors", -5)
    change_byte(second, f"{hurt.name}/shard-00000.safetensors", -5)
    with pytest.raises(DamagedError):
        restored(tmp_path / "local", second, "step:20")
    assert restored(tmp_path / "local", second) == 10


def test_what_neither_has_is_said(tmp_path: Path, second: Storage) -> None:
    second.make_dir()
    assert restored(tmp_path / "local", second) is None
    run(tmp_path / "local", second, 10)
    with pytest.raises(SelectorError, match="step:10"):
        restored(tmp_path / "local", second, "step:20")


class Slow(ControlledStorage):
    """A mirror behind a gate."""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    """`slow:` as a mirror's address means this storage."""
    made = Slow(tmp_path / "mirror")
    monkeypatch.setattr("engine.mirror.uploader.open_storage", lambda address, options=None: made)
    return made


def test_saves_commit_and_retention_waits_while_the_mirror_makes_no_progress(
    tmp_path: Path, slow: Slow
) -> None:
    slow.gate.clear()
    events: list[dict[str, Any]] = []
    made = state()
    local = LocalStorage(tmp_path / "local")
    keep = Retention(rolling=2)
    checkpointer = Checkpointer(
        tmp_path / "local", made, mirror="slow:", retention=keep, on_event=events.append
    )
    for step in (10, 20, 30, 40):
        checkpointer.save(step).result(DEADLINE_SECS)
    checkpointer.wait()
    assert slow.writing.wait(DEADLINE_SECS)
    assert steps_in(local) == [10, 20, 30, 40], "all are pending"
    slow.gate.set()
    checkpointer.close()
    assert {30, 40} <= set(steps_in(slow))
    assert steps_in(local) == [30, 40], (
        "what was kept only because it was pending is deleted once it is copied"
    )
    run(tmp_path / "local", "slow:", 50, retention=keep)
    assert steps_in(local) == [40, 50], "nothing is pending any more"


def test_a_broken_mirror_fails_no_save(tmp_path: Path, slow: Slow) -> None:
    def out(path: str) -> None:
        raise StorageUnavailableError("503 Slow Down")

    slow.broken = out
    events = run(tmp_path / "local", "slow:", 10, 20)
    kinds = [event["event"] for event in events]
    assert kinds.count("save_committed") == 2
    assert kinds.count("save_failed") == 0
    assert kinds.count("mirror_failed") == 1
    slow.broken = lambda path: None
    run(tmp_path / "local", "slow:")
    assert steps_in(slow) == [10, 20], "the next start sends what was left"


def test_an_error_in_the_loop_does_not_wait_for_the_mirror(tmp_path: Path, slow: Slow) -> None:
    def loop() -> None:
        with Checkpointer(tmp_path / "local", state(), mirror="slow:") as checkpointer:
            slow.gate.clear()
            checkpointer.save(10).result(DEADLINE_SECS)
            assert slow.writing.wait(DEADLINE_SECS)
            slow.gate.set()  # the copy in flight finds out that it was cancelled
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert steps_in(LocalStorage(tmp_path / "local")) == [10]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both the directory and its mirror"):
        Checkpointer(tmp_path / "a", state(), mirror=f"file://{tmp_path}/a/")
    with pytest.raises(ConfigError, match="mirror_freq is -1"):
        Checkpointer(tmp_path / "a", state(), mirror=tmp_path / "b", mirror_freq=-1)
    with (
        Lease.acquire(_made(tmp_path / "b"), run_id="other"),
        pytest.raises(DirectoryHeldError, match="/b is held"),
    ):
        Checkpointer(tmp_path / "a", state(), mirror=tmp_path / "b")
    Checkpointer(tmp_path / "a", state()).close(at_most(0.0))


def _made(folder: Path) -> LocalStorage:
    storage = LocalStorage(folder)
    storage.make_dir()
    return storage
