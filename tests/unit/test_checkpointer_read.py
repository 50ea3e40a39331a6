"""`read` gives stored values without objects to restore them into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import DamagedError, SelectorError
from tests.support.damage import flip_byte
from tests.support.training import model, photograph, train

State = dict[str, Any]


def trained() -> State:
    network = model(1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    train(network, optimizer, 2)
    return {
        "model": network,
        "optimizer": optimizer,
        "trainer": {"best": 1.5, "history": [torch.ones(2), 3], "seen": {1, 2}},
        "mine": {"n": 7},
        "ema": torch.arange(3.0),
    }


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, State]:
    state = trained()
    with Checkpointer(tmp_path, state, per_rank=("mine",)) as checkpointer:
        checkpointer.save(1).result()
        state["trainer"]["best"] = 0.5
        checkpointer.save(2).result()
    return tmp_path, state


def test_everything_is_read_by_state_key(saved: tuple[Path, State]) -> None:
    directory, state = saved
    with Checkpointer(directory, {}, read_only=True) as checkpointer:
        found = checkpointer.read()
    assert found.keys() == {*state, "rng"}
    assert found["model"].keys() == state["model"].state_dict().keys()
    for name, tensor in state["model"].state_dict().items():
        assert torch.equal(found["model"][name], tensor), name
    names = [name for name, _ in state["model"].named_parameters()]
    told = state["optimizer"].state_dict()
    assert found["optimizer"]["state"].keys() == set(names)
    for number, name in enumerate(names):
        for field, tensor in told["state"][number].items():
            assert torch.equal(found["optimizer"]["state"][name][field], tensor)
    (group,) = found["optimizer"]["param_groups"]
    assert (group["lr"], group["params"]) == (0.1, names)
    assert found["trainer"]["best"] == 0.5
    assert found["trainer"]["history"][0].tolist() == [1, 1]
    assert found["trainer"]["seen"] == {1, 2}
    assert found["mine"] == {"n": 7}
    assert found["ema"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("include", "keys", "tensors"),
    [
        (["trainer"], {"trainer"}, 0),
        (["model"], {"model"}, 9),
        (["model.0.*"], {"model"}, 2),
        (["optimizer.state.0.weight.*"], {"optimizer"}, 0),
        (["mine", "ema"], {"mine", "ema"}, 0),
    ],
)
def test_a_part_is_read_by_pattern(
    include: list[str], keys: set[str], tensors: int, saved: tuple[Path, State]
) -> None:
    with Checkpointer(saved[0], {}, read_only=True) as checkpointer:
        found = checkpointer.read("step:1", include=include)
    assert found.keys() == keys
    assert len(found.get("model", {})) == tensors
    if "optimizer" in found:
        assert found["optimizer"]["state"].keys() == {"0.weight"}


def test_an_older_one_is_read_by_its_selector_while_training_goes_on(saved: tuple[Path, State]) -> None:
    directory, state = saved
    before = photograph(state)
    with Checkpointer(directory, state, per_rank=("mine",)) as checkpointer:
        assert checkpointer.read("step:1", include=("trainer",))["trainer"]["best"] == 1.5
        assert str(photograph(state)) == str(before)
        checkpointer.save(3).result()


def test_nothing_to_read_is_an_empty_dict_but_a_typing_error_is_not(
    saved: tuple[Path, State], tmp_path: Path
) -> None:
    with Checkpointer(tmp_path / "new", {"a": {}}) as checkpointer:
        assert checkpointer.read() == {}
    with Checkpointer(saved[0], {}, read_only=True) as checkpointer:
        with pytest.raises(SelectorError, match=r"matches include=\['modle'\]; it holds .*model, optimizer"):
            checkpointer.read(include=["modle"])
        with pytest.raises(SelectorError):
            checkpointer.read("step:99")


def test_damage_is_found_and_latest_goes_back_to_the_one_before(saved: tuple[Path, State]) -> None:
    directory, _ = saved
    newest = max(path for path in directory.glob("step-*/shard-00000.safetensors"))
    flip_byte(newest, 4096 + 5)
    with Checkpointer(directory, {}, read_only=True) as checkpointer:
        assert checkpointer.read(include=["trainer", "model.*"])["trainer"]["best"] == 1.5
        with pytest.raises(DamagedError, match="block 0"):
            checkpointer.read("step:2", include=["model.*", "optimizer"])


def test_tied_weights_are_read_under_all_of_their_names(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tied.register_buffer("maybe", None)
    tied["b"].weight = tied["a"].weight
    with Checkpointer(tmp_path, {"model": tied}) as checkpointer:
        checkpointer.save(1).result()
        found = checkpointer.read()["model"]
    assert found.keys() == tied.state_dict().keys()
    assert found["a.weight"] is found["b.weight"]


def test_what_is_declared_per_rank_is_read_as_this_ranks_own(tmp_path: Path) -> None:
    state = trained()
    with Checkpointer(tmp_path, state, per_rank=("model", "optimizer")) as checkpointer:
        checkpointer.save(1).result()
        found = checkpointer.read(include=["model", "optimizer"])
    assert found["model"].keys() == state["model"].state_dict().keys()
    assert torch.equal(found["model"]["0.weight"], state["model"][0].weight)
    assert found["optimizer"]["state"].keys() == {name for name, _ in state["model"].named_parameters()}
