"""`check_snapshots`: a save whose files are not the state of one moment fails and names the tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.errors import SaveFailedError
from engine.save import staging_copy as copy_module
from engine.storage.base import WriteStats
from engine.storage.local import LocalStorage
from engine.storage.source import Source
from tests.support.controlled import DEADLINE_SECS, ControlledStorage, use
from tests.support.damage import flip_byte
from tests.support.training import model, train

State = dict[str, Any]


def training_state() -> State:
    network = model(width=300)
    state = {"model": network, "optimizer": torch.optim.AdamW(network.parameters())}
    train(network, state["optimizer"])
    # Empty ones, a scalar, a bool and a bf16 one: nothing of a state is left out.
    odd = {"empty": torch.zeros(0, 3), "none": torch.zeros(0), "flag": torch.tensor(True)}
    odd["half"] = torch.ones(5, dtype=torch.bfloat16)
    return {**state, "odd": odd}


def committed(checkpointer: Checkpointer) -> list[int | None]:
    return [item.step for item in checkpointer.list() if item.status == "committed"]


def test_training_that_goes_on_at_once_is_no_tear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer waits until the optimizer has stepped: what it writes is the state before."""
    storage = ControlledStorage(tmp_path)
    use(monkeypatch, storage)
    state = training_state()
    with Checkpointer("ignored", state, check_snapshots=True) as checkpointer:
        for step in range(1, 4):
            storage.gate.clear()
            handle = checkpointer.save(step)
            train(state["model"], state["optimizer"], 2)
            storage.gate.set()
            assert handle.result(DEADLINE_SECS) is not None
        assert committed(checkpointer) == [1, 2, 3]


def stepping_between(state: State) -> Callable[..., None]:
    """Copies half of the tensors, lets the optimizer step, and copies the others."""
    real = copy_module.copy_pairs

    def copy(pairs: Sequence[copy_module.Pair], *, non_blocking: bool) -> None:
        half = len(pairs) // 2
        real(pairs[:half], non_blocking=non_blocking)
        train(state["model"], state["optimizer"])
        real(pairs[half:], non_blocking=non_blocking)

    return copy


@pytest.mark.parametrize("check", [True, False])
def test_a_step_in_the_middle_of_the_copy(
    check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = training_state()
    with Checkpointer(tmp_path, state, check_snapshots=check) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(copy_module, "copy_pairs", stepping_between(state))
            handle = checkpointer.save(1)
        if not check:
            assert handle.result(DEADLINE_SECS) is not None, "nothing else would have found it"
            return
        with pytest.raises(SaveFailedError, match="differ from those in memory when save") as caught:
            handle.result(DEADLINE_SECS)
        assert "optimizer.state." in str(caught.value)
        assert "guard()" in str(caught.value)
        assert committed(checkpointer) == []
        checkpointer.save(2).result(DEADLINE_SECS)
        assert committed(checkpointer) == [2]


def test_a_weight_changed_by_another_thread_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = training_state()
    real = copy_module.copy_pairs

    def copy(pairs: Sequence[copy_module.Pair], *, non_blocking: bool) -> None:
        def meddle() -> None:
            with torch.no_grad():
                state["model"][3].bias.add_(1)

        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()
        real(pairs, non_blocking=non_blocking)

    with Checkpointer(tmp_path, state, check_snapshots=True) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(copy_module, "copy_pairs", copy)
            handle = checkpointer.save(1)
        with pytest.raises(SaveFailedError, match=r"the saved values of model\.3\.bias differ"):
            handle.result(DEADLINE_SECS)


class Careless(LocalStorage):
    """Reports success, and has changed a byte."""

    def write_shard(self, path: str, source: Source) -> WriteStats:
        stats = super().write_shard(path, source)
        flip_byte(Path(self.root) / path)
        return stats


def test_the_file_itself_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Careless(tmp_path))
    with Checkpointer("ignored", training_state(), check_snapshots=True) as checkpointer:
        handle = checkpointer.save(1)
        with pytest.raises(SaveFailedError, match="the saved values of per_rank"):
            handle.result(DEADLINE_SECS)
        assert committed(checkpointer) == []
        checkpointer.save(2)
        with pytest.raises(SaveFailedError, match="the saved values of per_rank"):
            checkpointer.save(3)  # no failure that training is carried on after
