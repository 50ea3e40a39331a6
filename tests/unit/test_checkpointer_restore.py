"""Which checkpoint a restore takes, how it handles damage, and what it refuses without changing anything."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import (
    ConfigError,
    DamagedError,
    HoldfastError,
    RestoreFailedError,
    SelectorError,
    StateMismatchError,
    StorageError,
    StorageUnavailableError,
)
from engine.restore import chosen, restorer
from engine.storage.local import LocalStorage
from tests.support.damage import flip_byte
from tests.support.training import differences, model, photograph, train

State = dict[str, Any]


def values(n: int) -> State:
    """A state whose tensor spans several digest blocks."""
    return {"values": {"n": n, "t": torch.full((100_000,), float(n))}}


def write(directory: Path, *steps: int, **more: Any) -> list[str]:
    """One checkpoint a step; the value is the step. Returns the ids."""
    state = values(0)
    ids = []
    with Checkpointer(directory, state, **more) as checkpointer:
        for step in steps:
            state["values"].update(values(step)["values"])
            record = checkpointer.save(
                step, epoch=step // 10, metrics={"val_loss": abs(step - 3)}, reasons=("interval", "epoch")
            ).result(60)
            assert record is not None
            ids.append(record.id)
    return ids


def shard(directory: Path, id: str) -> Path:
    return directory / id / "shard-00000.safetensors"


def test_nothing_at_all_is_none(tmp_path: Path) -> None:
    state = values(5)
    with Checkpointer(tmp_path / "new" / "deep", state) as checkpointer:
        assert checkpointer.restore("latest") is None
        assert checkpointer.list() == []
        assert state["values"]["n"] == 5
        checkpointer.save(1).result(60)


@pytest.mark.parametrize("selector", ["backup", "best", "epoch:0", "step:3", "step-00000001-aaaaaaaa"])
def test_any_other_selector_that_finds_nothing_is_an_error(selector: str, tmp_path: Path) -> None:
    with Checkpointer(tmp_path, values(0)) as checkpointer, pytest.raises(SelectorError):
        checkpointer.restore(selector)


@pytest.mark.parametrize(
    ("selector", "step"),
    [("latest", 11), ("backup", 4), ("best", 3), ("step:1", 1), ("epoch:0", 4), ("epoch:1", 11)],
)
def test_selectors(selector: str, step: int, tmp_path: Path) -> None:
    write(tmp_path, 1, 3, 4, 11, retention=None)
    state = values(0)
    with Checkpointer(tmp_path, state) as checkpointer:
        record = checkpointer.restore(selector)
    assert record is not None
    assert record.step == state["values"]["n"] == step


@pytest.mark.parametrize("form", [str, lambda path: f"file://{path}"], ids=["path", "uri"])
def test_a_checkpoint_of_another_directory(form: Callable[[Path], str], tmp_path: Path) -> None:
    """The run goes on in its own directory; where it came from is in the lineage."""
    (id,) = write(tmp_path / "old", 7)
    state = values(0)
    with Checkpointer(tmp_path / "new", state) as checkpointer:
        record = checkpointer.restore(form(tmp_path / "old" / id))
        assert record is not None
        assert state["values"]["n"] == 7
        after = checkpointer.save(8).result(60)
        assert after is not None
        assert after.parent == id
    assert not (tmp_path / "old" / after.id).exists()


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with Checkpointer(tmp_path, values(0)) as checkpointer, pytest.raises(SelectorError, match="no manifest"):
        checkpointer.restore(str(tmp_path / "folder"))


def test_a_copy_under_another_name_restores_by_its_path(tmp_path: Path) -> None:
    (id,) = write(tmp_path, 7)
    shutil.copytree(tmp_path / id, tmp_path / "kept" / "my-best-model")
    shutil.rmtree(tmp_path / id)
    state = values(0)
    with Checkpointer(tmp_path, state) as checkpointer:
        record = checkpointer.restore(str(tmp_path / "kept" / "my-best-model"))
    assert record is not None
    assert state["values"]["n"] == 7


@pytest.mark.parametrize("where", [-1, 4096, 100_000], ids=["end", "begin", "middle"])
def test_a_flipped_bit_in_the_newest_sends_latest_back(
    where: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = write(tmp_path, 1, 2, 3, retention=None)
    flip_byte(shard(tmp_path, third), where)
    state = values(0)
    with Checkpointer(tmp_path, state) as checkpointer:
        record = checkpointer.restore("latest")
        assert record is not None
        assert record.id == second
        assert state["values"]["n"] == 2
        assert bool((state["values"]["t"] == 2).all())
        status = {item.id: (item.status, item.reason) for item in checkpointer.list()}
        assert status[first][0] == status[second][0] == "committed"
        assert status[third][0] == "damaged"
        for word in ("shard-00000.safetensors", "block", "digest"):
            assert word in status[third][1]
        caplog.clear()
        # Marked: it is not tried first again.
        assert checkpointer.restore("latest") == record
    assert any("skipping" in message for message in caplog.messages)
    assert third in caplog.text


def test_the_mark_outlives_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, second, third = write(tmp_path, 1, 2, 3, retention=None)
    flip_byte(shard(tmp_path, third))
    with Checkpointer(tmp_path, values(0)) as checkpointer:
        checkpointer.restore("latest")
    monkeypatch.setattr(LocalStorage, "open_reader", _refusing(third, LocalStorage.open_reader))
    with Checkpointer(tmp_path, values(0)) as checkpointer:
        record = checkpointer.restore("latest")
    assert record is not None
    assert record.id == second


def _refusing(id: str, real: Any) -> Any:
    def open_reader(storage: Any, path: str) -> Any:
        assert not (id in path and "shard" in path), "a damaged checkpoint was tried again"
        return real(storage, path)

    return open_reader


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "data": lambda path: flip_byte(path / "shard-00000.safetensors"),
    "header": lambda path: flip_byte(path / "shard-00000.safetensors", 20),
    "index": lambda path: flip_byte(path / "shard-00000.json", 30),
    "manifest": lambda path: flip_byte(path / "manifest.json", 30),
    "truncated": lambda path: (path / "shard-00000.safetensors").write_bytes(b"x" * 5000),
    "empty-manifest": lambda path: (path / "manifest.json").write_bytes(b""),
    "missing-shard": lambda path: (path / "shard-00000.safetensors").unlink(),
    "missing-index": lambda path: (path / "shard-00000.json").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_latest_walks_back_past_any_damage(kind: str, tmp_path: Path) -> None:
    first, second = write(tmp_path, 1, 2, retention=None)
    DAMAGE[kind](tmp_path / second)
    state = values(0)
    with Checkpointer(tmp_path, state) as checkpointer:
        record = checkpointer.restore("latest")
    assert record is not None
    assert record.id == first
    assert state["values"]["n"] == 1


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if "manifest" not in kind])
@pytest.mark.parametrize("form", ["step", "id", "path"])
def test_an_explicit_selector_fails_on_damage(form: str, kind: str, tmp_path: Path) -> None:
    _, id = write(tmp_path, 1, 2, retention=None)
    DAMAGE[kind](tmp_path / id)
    selector = {"step": "step:2", "id": id, "path": str(tmp_path / id)}[form]
    with Checkpointer(tmp_path, values(0)) as checkpointer:
        with pytest.raises((DamagedError, SelectorError)):
            checkpointer.restore(selector)
        assert checkpointer.restore("latest") is not None


def test_only_damaged_ones_are_an_error_that_lists_them(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1, 2, retention=None)
    for id in (first, second):
        flip_byte(shard(tmp_path, id))
    with Checkpointer(tmp_path, values(0)) as checkpointer:
        with pytest.raises(DamagedError) as caught:
            checkpointer.restore("latest")
        assert "no whole checkpoint" in str(caught.value)
        assert first in str(caught.value)
        assert second in str(caught.value)
    assert (tmp_path / first).exists()
    assert (tmp_path / second).exists()


def test_only_partial_ones_are_an_error_too(tmp_path: Path) -> None:
    (id,) = write(tmp_path, 1)
    (tmp_path / id / "manifest.json").unlink()
    with (
        Checkpointer(tmp_path, values(0), read_only=True) as checkpointer,
        pytest.raises(DamagedError, match=id),
    ):
        checkpointer.restore("latest")


def test_a_checkpoint_that_vanishes_while_it_is_chosen_was_retired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write(tmp_path, 1, 2, retention=None)
    real = LocalStorage.read_bytes

    def read_bytes(storage: LocalStorage, path: str, *, max_bytes: int) -> bytes:
        if path == f"{second}/shard-00000.json":
            shutil.rmtree(tmp_path / second)
        return real(storage, path, max_bytes=max_bytes)

    monkeypatch.setattr(LocalStorage, "read_bytes", read_bytes)
    state = values(0)
    with Checkpointer(tmp_path, state) as checkpointer:
        record = checkpointer.restore("latest")
        assert record is not None
        assert record.id == first
        assert [item.status for item in checkpointer.list()] == ["committed"], "nothing is marked damaged"


def test_an_outage_is_not_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    with Checkpointer(tmp_path, values(0)) as checkpointer:

        def down(storage: LocalStorage, path: str = "") -> Any:
            raise StorageUnavailableError("the store is down")

        monkeypatch.setattr(LocalStorage, "list_dir", down)
        with pytest.raises(StorageError, match="down"):
            checkpointer.restore("latest")
        with pytest.raises(StorageError, match="down"):
            checkpointer.list()
        monkeypatch.undo()
        assert checkpointer.restore("latest") is not None


def test_an_outage_in_mid_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, second = write(tmp_path, 1, 2, retention=None)

    def down(storage: LocalStorage, path: str) -> Any:
        raise StorageUnavailableError("the store is down")

    with Checkpointer(tmp_path, values(0)) as checkpointer:
        monkeypatch.setattr(LocalStorage, "open_reader", down)
        with pytest.raises(StorageUnavailableError):
            checkpointer.restore("latest")
        monkeypatch.undo()
        assert [item.status for item in checkpointer.list()] == ["committed", "committed"]
        record = checkpointer.restore("latest")
        assert record is not None
        assert record.id == second


def training_state(seed: int = 0, width: int = 5, **more: Any) -> State:
    network = model(seed, width)
    return {"model": network, "optimizer": torch.optim.AdamW(network.parameters()), **more}


def test_everything_that_does_not_fit_is_reported_at_once_and_nothing_changed(tmp_path: Path) -> None:
    state = training_state(1, extra={"t": torch.ones(2)}, scale=torch.ones(2), old=[1])
    train(state["model"], state["optimizer"])
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1).result(60)
    network = model(2, width=5)
    network[0] = nn.Linear(6, 5, dtype=torch.float64)  # dtype
    network[1] = nn.Identity()  # unexpected
    network[3] = nn.Linear(5, 4)  # shape
    network.append(nn.Linear(4, 4))  # missing
    optimizer = torch.optim.AdamW(network.parameters())
    other: State = {"model": network, "optimizer": optimizer, "extra": {"t": torch.zeros(2)}}
    other |= {"scale": torch.zeros(3), "old": {"a": 1}, "brand_new": {"n": 1}}
    before, generators = photograph(other), torch.get_rng_state()
    with Checkpointer(tmp_path, other) as checkpointer:
        with pytest.raises(StateMismatchError) as caught:
            checkpointer.restore("latest")
        message = str(caught.value)
        for line in (
            "model.0.weight: saved as F32 [5, 6], here F64 [5, 6]",
            "model.3.weight: saved as F32 [3, 5], here F32 [4, 5]",
            "model.3.bias: saved as F32 [3], here F32 [4]",
            "model.4.weight",
            "model.1.running_mean",
            "optimizer.state.0.weight.exp_avg: saved as F32 [5, 6], here F64 [5, 6]",
            "scale: saved as F32 [2], here F32 [3]",
            "old: a dict here",
            "brand_new (all of it)",
            "nothing was changed",
        ):
            assert line in message, line
        assert differences(photograph(other), before) == []
        assert optimizer.state_dict()["state"] == {}, "nor was the optimizer given any state"
        assert torch.equal(torch.get_rng_state(), generators)
        assert [item.status for item in checkpointer.list()] == ["committed"], "it is not damaged"
        checkpointer.save(2).result(60)  # the state is as it was: saving is allowed


def test_a_saved_value_that_nothing_takes_is_told_not_dropped(tmp_path: Path) -> None:
    """Values that are no tensors count as much: a schedule or a loader that the state has lost."""
    saved = {**values(1), "schedule": {"last_step": 7}, "mine": {"n": 1}}
    with Checkpointer(tmp_path, saved, per_rank=("mine",)) as checkpointer:
        checkpointer.save(1).result(60)
    state = values(5)
    with Checkpointer(tmp_path, state, read_only=True) as checkpointer:
        with pytest.raises(StateMismatchError) as caught:
            checkpointer.restore("latest")
        for line in ("not in the state (2)", "mine (all of it)", "schedule (all of it)"):
            assert line in str(caught.value)
        assert state["values"]["n"] == 5
        for left_out in (["schedule", "mine"], ["schedule.*", "mi*"]):
            assert checkpointer.restore("latest", exclude=left_out) is not None
        assert checkpointer.restore("latest", include=["values"]) is not None
        assert state["values"]["n"] == 1


def test_without_strictness_it_is_told_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path, {**values(1), "schedule": {"last_step": 7}}) as checkpointer:
        checkpointer.save(1).result(60)
    with Checkpointer(tmp_path, values(5), read_only=True) as checkpointer:
        checkpointer.restore("latest", strict=False)
    assert "not in the state  schedule (all of it)" in caplog.text


def test_a_module_is_no_value(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"part": nn.Linear(2, 2)}) as checkpointer:
        checkpointer.save(1).result(60)
    checkpointer = Checkpointer(tmp_path, {"part": {"weight": 1}}, read_only=True)
    with checkpointer, pytest.raises(StateMismatchError, match="part: saved as a module, here a dict"):
        checkpointer.restore("latest")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (torch.ones(1), torch.zeros(3)),
        (torch.ones(3), torch.zeros(3, dtype=torch.int64)),
        (torch.ones(3), [1]),
        ([1], {"a": 1}),
        ({"a": 1}, [1]),
        ([torch.ones(1)], torch.ones(1)),
        ({"t": torch.ones(1)}, torch.ones(1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_entries_of_another_kind_are_refused(before: Any, now: Any, tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"entry": before}) as checkpointer:
        checkpointer.save(1).result(60)
    kept = photograph({"entry": now})
    checkpointer = Checkpointer(tmp_path, {"entry": now})
    with checkpointer, pytest.raises(StateMismatchError, match="entry: "):
        checkpointer.restore("latest")
    assert differences(photograph({"entry": now}), kept) == []


@pytest.mark.parametrize("declared", [True, False])
def test_an_entry_that_has_become_per_rank_or_is_no_longer(declared: bool, tmp_path: Path) -> None:
    names = [("mine",), ()]
    with Checkpointer(tmp_path, {"mine": {"n": 1}}, per_rank=names[declared]) as checkpointer:
        checkpointer.save(1).result(60)
    mine = {"n": 2}
    checkpointer = Checkpointer(tmp_path, {"mine": mine}, per_rank=names[not declared])
    with checkpointer, pytest.raises(StateMismatchError, match="per_rank"):
        checkpointer.restore("latest")
    assert mine == {"n": 2}


def test_an_optimizer_whose_parameters_are_grouped_otherwise(tmp_path: Path) -> None:
    network = model(1)
    parameters = list(network.parameters())
    one = torch.optim.AdamW([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}])
    train(network, one)
    with Checkpointer(tmp_path, {"model": network, "optimizer": one}) as checkpointer:
        checkpointer.save(1).result(60)
    two = torch.optim.AdamW(network.parameters())
    checkpointer = Checkpointer(tmp_path, {"model": network, "optimizer": two})
    with checkpointer, pytest.raises(StateMismatchError, match=r"lr of group 0 was 0.1 for 0.weight"):
        checkpointer.restore("latest")
    assert two.state_dict()["state"] == {}


class Fragile:
    """Refuses what it is given until it is repaired; with a tensor, so that it is not tried before."""

    def __init__(self) -> None:
        self.broken = True

    def state_dict(self) -> State:
        return {"n": torch.ones(1)}

    def load_state_dict(self, state: State) -> None:
        if self.broken:
            raise KeyError("unknown field")


def test_after_a_restore_that_broke_off_saving_is_refused(tmp_path: Path) -> None:
    fragile = Fragile()
    with Checkpointer(tmp_path, {**values(1), "fragile": fragile}) as checkpointer:
        checkpointer.save(1).result(60)
        with pytest.raises(RestoreFailedError, match="KeyError: 'unknown field'") as caught:
            checkpointer.restore("latest")
        assert "Not restored: fragile, the random number generators" in str(caught.value)
        with pytest.raises(RestoreFailedError, match="undefined"):
            checkpointer.save(2)
        with pytest.raises(RestoreFailedError):
            checkpointer.restore("latest")
        fragile.broken = False
        assert checkpointer.restore("latest") is not None
        record = checkpointer.save(2).result(60)
    assert record is not None
    assert [item.status for item in checkpointer.list()] == ["committed", "committed"]


def test_damage_found_in_mid_read_leaves_the_state_undefined(tmp_path: Path) -> None:
    (id,) = write(tmp_path, 1)
    flip_byte(shard(tmp_path, id))
    with Checkpointer(tmp_path, values(0)) as checkpointer:
        with pytest.raises(DamagedError):
            checkpointer.restore("latest")
        with pytest.raises(RestoreFailedError):
            checkpointer.save(1)


def test_a_refused_selector_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, 1)
    state = values(9)
    with Checkpointer(tmp_path, state) as checkpointer:
        for selector in ("step:99", "nonsense", ""):
            with pytest.raises(HoldfastError):
                checkpointer.restore(selector)
        assert state["values"]["n"] == 9
        checkpointer.save(2).result(60)


def test_going_back_starts_a_branch_of_its_own(tmp_path: Path) -> None:
    """Order depends on neither steps nor clocks: `latest` is the new branch's newest."""
    ids = write(tmp_path, 100, 200, 300, retention=None)
    state = values(0)
    with Checkpointer(tmp_path, state, retention=None) as checkpointer:
        checkpointer.restore("step:100")
        one = checkpointer.save(101).result(60)
        two = checkpointer.save(200).result(60)
        assert one is not None
        assert two is not None
        assert (one.parent, two.parent) == (ids[0], one.id)
        assert (one.sequence, two.sequence) == (4, 5)
        latest = checkpointer.restore("latest")
        assert latest == two
        again = checkpointer.restore("step:200")
        assert again == two, "the newest of that step"


def test_model_only_starts_no_branch(tmp_path: Path) -> None:
    """Weights of another checkpoint are a start, not an ancestor."""
    with Checkpointer(tmp_path / "source", {"model": model(1)}) as checkpointer:
        source = checkpointer.save(1).result(60)
    assert source is not None
    with Checkpointer(tmp_path / "new", {"model": model(2)}) as checkpointer:
        checkpointer.restore(source.path, model_only=True)
        record = checkpointer.save(2).result(60)
    assert record is not None
    assert record.parent is None


def test_read_only_takes_no_lease_and_cannot_save(tmp_path: Path) -> None:
    state = values(0)
    (id,) = write(tmp_path, 5)
    with Checkpointer(tmp_path, values(0)) as writer:
        with Checkpointer(tmp_path, state, read_only=True) as reader:
            assert reader.restore("latest") is not None
            assert state["values"]["n"] == 5
            assert [item.id for item in reader.list()] == [id]
            with pytest.raises(ConfigError, match="read_only"):
                reader.save(6)
            reader.poll()
            reader.wait()
        writer.save(6).result(60)


def test_read_only_writes_nothing(tmp_path: Path) -> None:
    _, second = write(tmp_path, 1, 2, retention=None)
    flip_byte(shard(tmp_path, second))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    state = values(0)
    with Checkpointer(tmp_path, state, read_only=True) as reader:
        record = reader.restore("latest")
    assert record is not None
    assert record.step == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_could_not_be_marked_is_not_tried_first_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader may not write into the directory, but it can remember."""
    _, second, third = write(tmp_path, 1, 2, 3, retention=None)
    flip_byte(shard(tmp_path, third))
    with Checkpointer(tmp_path, values(0), read_only=True) as reader:
        with pytest.raises(DamagedError):
            reader.restore("step:3")
        monkeypatch.setattr(LocalStorage, "open_reader", _refusing(third, LocalStorage.open_reader))
        for _ in range(2):
            record = reader.restore("latest")
            assert record is not None
            assert record.id == second
    assert not (tmp_path / third / "damaged.json").exists()


def test_at_the_same_world_size_nothing_is_said_about_random_streams(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path, 1)
    with Checkpointer(tmp_path, values(0)) as checkpointer:
        checkpointer.restore("latest")
    assert "random streams" not in caplog.text


def test_the_restored_event(tmp_path: Path) -> None:
    (id,) = write(tmp_path, 3)
    events: list[dict[str, Any]] = []
    with Checkpointer(tmp_path, values(0), on_event=events.append) as checkpointer:
        checkpointer.restore("latest")
    (event,) = events
    assert (event["event"], event["step"], event["id"], event["world_size"]) == ("restored", 3, id, 1)
    assert event["bytes"] >= 400_000
    assert event["secs"] >= 0


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fits", [True, False])
def test_the_collector_is_off_while_a_restore_is_planned_and_no_longer(
    enabled: bool, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    seen: dict[str, bool] = {}

    def spied(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def spy(*given: Any, **more: Any) -> Any:
            seen[name] = gc.isenabled()
            return real(*given, **more)

        monkeypatch.setattr(module, name, spy)

    spied(restorer, "choose_checkpoint")
    spied(chosen, "plan_reads")
    spied(chosen, "read_slices")
    state = values(0) if fits else {"others": {"n": 0}}
    was_enabled = gc.isenabled()
    with Checkpointer(tmp_path, state) as checkpointer:
        try:
            if not enabled:
                gc.disable()
            if fits:
                checkpointer.restore("latest")
                assert seen == {"choose_checkpoint": False, "plan_reads": False, "read_slices": enabled}
            else:
                with pytest.raises(StateMismatchError):
                    checkpointer.restore("latest")
            assert gc.isenabled() is enabled
        finally:
            gc.enable() if was_enabled else gc.disable()


def test_a_restore_in_inference_mode_makes_tensors_that_can_be_trained_on(tmp_path: Path) -> None:
    """Evaluation code often runs in it, and the optimizer's step would raise later."""

    def made() -> dict[str, Any]:
        module = nn.Linear(3, 2)
        return {"model": module, "optimizer": torch.optim.AdamW(module.parameters()), "notes": {}}

    def step(state: dict[str, Any]) -> None:
        state["model"](torch.ones(3)).sum().backward()
        state["optimizer"].step()

    first, second = made(), made()
    step(first)
    first["notes"]["seen"] = torch.ones(2)
    with Checkpointer(tmp_path, first) as checkpointer:
        checkpointer.save(1).result()
    with Checkpointer(tmp_path, second) as checkpointer, torch.inference_mode():
        checkpointer.restore()
    step(second)
    second["notes"]["seen"].add_(1)


def test_a_tensor_that_was_made_in_inference_mode_is_restored(tmp_path: Path) -> None:
    with torch.inference_mode():
        average, notes = torch.ones(3), {"x": torch.ones(2)}
    with Checkpointer(tmp_path, {"average": average, "notes": notes}) as checkpointer:
        checkpointer.save(1).result()
        with torch.inference_mode():
            average.zero_()
            notes["x"].zero_()
        checkpointer.restore()
    assert average.tolist() == [1, 1, 1]
    assert notes["x"].tolist() == [1, 1]
