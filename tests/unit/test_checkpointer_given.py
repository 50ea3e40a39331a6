"""A save or restore refuses a state whose objects are not those given to the Checkpointer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import HoldfastError, RestoreFailedError, StateMismatchError, UnsavableValueError


def made() -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": module, "optimizer": optimizer, "notes": {"a": 1, "t": torch.ones(2)}}


def test_an_entry_that_was_replaced_is_neither_saved_nor_restored(tmp_path: Path) -> None:
    """The old object would be saved, and the new one would go on without what was restored."""
    state = made()
    first = state["optimizer"]
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1).result()
        state["optimizer"] = torch.optim.AdamW(state["model"].parameters())
        with pytest.raises(UnsavableValueError, match="entry 'optimizer' was replaced after"):
            checkpointer.save(2)
        with pytest.raises(UnsavableValueError, match="entry 'optimizer' was replaced after"):
            checkpointer.restore()
        state["optimizer"] = first
        state["ahead"] = {"x": torch.zeros(1)}
        with pytest.raises(UnsavableValueError, match="'ahead' was added to the state after"):
            checkpointer.save(2)
        del state["ahead"]
        checkpointer.save(2).result()


@pytest.mark.parametrize(
    "options", [{"include": ["notes.t"]}, {"exclude": ["notes.a"]}, {"exclude": ["rng.torch"]}]
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_a_value_cannot_be_chosen(options: Any, strict: bool, tmp_path: Path) -> None:
    """It used to restore nothing of it, or all of it, and to report success."""
    state = made()
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1).result()
        state["notes"]["a"] = 2
        with pytest.raises(StateMismatchError, match=r"is restored as a whole: name '(notes|rng)'"):
            checkpointer.restore(**options, strict=strict)
    assert state["notes"]["a"] == 2


def test_a_pattern_may_mean_the_moments_of_every_optimizer(tmp_path: Path) -> None:
    state = made()
    moments = state["optimizer"].state[state["model"].weight]
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1).result()
        saved = moments["exp_avg"].clone()
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name].fill_(5.0)
        checkpointer.restore(include=["*.exp_avg"])
    assert torch.equal(moments["exp_avg"], saved)
    assert bool((moments["exp_avg_sq"] == 5).all())


class Entry:
    def state_dict(self) -> dict[str, Any]:
        raise ValueError("boom")

    def load_state_dict(self, state: Any) -> None: ...


class Extra(nn.Linear):
    refuses = False

    def get_extra_state(self) -> dict[str, Any]:
        return {"n": 1}

    def set_extra_state(self, state: Any) -> None:
        if self.refuses:
            raise ValueError("boom")


class Own(torch.optim.SGD):
    refuses_to_save = refuses = False

    def state_dict(self) -> dict[str, Any]:
        if self.refuses_to_save:
            raise ValueError("boom")
        return super().state_dict()

    def load_state_dict(self, state: Any) -> None:
        if self.refuses:
            raise ValueError("boom")
        super().load_state_dict(state)


def test_an_error_of_foreign_code_names_the_entry(tmp_path: Path) -> None:
    module = Extra(2, 2)
    optimizer = Own(module.parameters())
    state = {"model": module, "optimizer": optimizer}

    def says(message: str, error: type[HoldfastError], call: Any) -> None:
        with pytest.raises(error, match=message):
            call()

    with Checkpointer(tmp_path / "entry", {"scaler": Entry()}) as checkpointer:
        says(r"scaler: state_dict\(\) of Entry failed", UnsavableValueError, lambda: checkpointer.save(1))
    with Checkpointer(tmp_path / "run", state) as checkpointer:
        checkpointer.save(1).result()
        optimizer.refuses_to_save = True
        says(r"optimizer: state_dict\(\) of Own failed", UnsavableValueError, lambda: checkpointer.save(2))
        optimizer.refuses_to_save, optimizer.refuses = False, True
        says(r"optimizer: load_state_dict\(\) of Own did not", RestoreFailedError, checkpointer.restore)
        module.refuses = True
        says(r"model: load_state_dict\(\) of Extra did not accept", RestoreFailedError, checkpointer.restore)
