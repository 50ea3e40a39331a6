"""`restore(rename={saved: live})`: parts of a checkpoint under other names, with all that goes by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import ConfigError, StateMismatchError
from tests.support.training import differences, photograph

State = dict[str, Any]


class Net(nn.Module):
    """A body and a head under names that are given, with a buffer and extra state in the body."""

    def __init__(self, body: str, head: str) -> None:
        super().__init__()
        self.names = (body, head)
        setattr(self, body, Body())
        setattr(self, head, nn.Linear(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        body, head = (getattr(self, name) for name in self.names)
        return head(body(x))  # type: ignore[no-any-return]


class Body(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.calls: Any = 0
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("maybe", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x).relu()

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state


def trained(body: str, head: str, steps: int) -> State:
    torch.manual_seed(steps)
    network = Net(body, head)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1 / (1 + steps))
    for _ in range(steps):
        network(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        getattr(network, body).seen += 1
        for parameter in network.parameters():
            state = optimizer.state[parameter]
            state["calls"] = state.get("calls", 0) + 1
    return {"model": network, "optimizer": optimizer, "stats": {"n": steps}}


def save(directory: Path, state: State, **options: Any) -> None:
    with Checkpointer(directory, state, **options) as checkpointer:
        checkpointer.save(1).result()


def restore(directory: Path, state: State, rename: dict[str, str], **options: Any) -> None:
    own = options.pop("per_rank", ())
    with Checkpointer(directory, state, read_only=True, per_rank=own) as checkpointer:
        checkpointer.restore(rename=rename, **options)


def assert_equal(live: State, saved: State) -> None:
    one, two = live["model"], saved["model"]
    for mine, theirs in zip(one.names, two.names, strict=True):
        a, b = getattr(one, mine), getattr(two, theirs)
        assert differences(photograph({"m": a}), photograph({"m": b})) == []
    told, wanted = live["optimizer"].state_dict(), saved["optimizer"].state_dict()
    assert differences({"o": told}, {"o": wanted}) == []


@pytest.mark.parametrize("per_rank", [(), ("model", "optimizer")], ids=["shared", "per rank"])
def test_a_part_under_another_name_brings_its_moments_and_extra_state(
    per_rank: tuple[str, ...], tmp_path: Path
) -> None:
    saved = trained("encoder", "head", 3)
    save(tmp_path, saved, per_rank=per_rank)
    live = trained("backbone", "head", 0)
    live["model"].backbone.maybe = torch.ones(2)
    restore(tmp_path, live, {"model.encoder": "model.backbone"}, per_rank=per_rank)
    assert live["model"].backbone.maybe is None
    assert live["model"].backbone.calls == 3
    assert live["stats"] == {"n": 3}
    assert_equal(live, saved)


def test_state_keys_are_renamed_with_all_below_them(tmp_path: Path) -> None:
    saved = trained("encoder", "head", 2)
    save(tmp_path, saved)
    fresh = trained("encoder", "head", 0)
    live = {"net": fresh["model"], "opt": fresh["optimizer"], "counts": fresh["stats"]}
    restore(tmp_path, live, {"model": "net", "optimizer": "opt", "stats": "counts"})
    assert_equal(fresh, saved)
    assert live["counts"] == {"n": 2}


def test_names_are_exchanged_at_once(tmp_path: Path) -> None:
    saved = {"m": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})}
    save(tmp_path, saved)
    live = {"m": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})}
    restore(tmp_path, live, {"m.a": "m.b", "m.b": "m.a"})
    assert torch.equal(live["m"]["a"].weight, saved["m"]["b"].weight)
    assert torch.equal(live["m"]["b"].weight, saved["m"]["a"].weight)


def test_an_average_takes_the_place_of_the_model(tmp_path: Path) -> None:
    saved = {"model": nn.Linear(2, 2), "ema": nn.Linear(2, 2), "n": {"n": 1}}
    save(tmp_path, saved)
    live = nn.Linear(2, 2)
    restore(tmp_path, {"model": live, "n": {"n": 0}}, {"ema": "model"})
    assert torch.equal(live.weight, saved["ema"].weight)  # type: ignore[union-attr]


def test_a_single_tensor_and_tied_weights_follow(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    save(tmp_path, {"model": tied})
    live = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "c": nn.Linear(2, 2, bias=False)})
    live["c"].weight = live["a"].weight
    restore(tmp_path, {"model": live}, {"model.b.weight": "model.c.weight"})
    assert torch.equal(live["a"].weight, tied["a"].weight)
    apart = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "c": nn.Linear(2, 2, bias=False)})
    restore(tmp_path, {"model": apart}, {"model.b.weight": "model.c.weight"})
    assert torch.equal(apart["c"].weight, tied["a"].weight)


def test_a_whole_submodule_becomes_an_entry_of_its_own(tmp_path: Path) -> None:
    saved = trained("encoder", "head", 2)
    save(tmp_path, saved)
    body = Body()
    restore(tmp_path, {"encoder": body}, {"model.encoder": "encoder"}, include=["encoder"])
    assert torch.equal(body.weight, saved["model"].encoder.weight)
    assert (body.calls, body.seen.tolist()) == (2, [2, 2])


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ({"model.encodr": "model.backbone"}, r"rename names 'model\.encodr', which step-.* does not hold"),
        ({"model.enc": "model.backbone"}, r"rename names 'model\.enc', which"),
        (
            {"model.encoder": "model.x", "model.head": "model.x"},
            r"rename maps both model\.\w+\.\w+ and model\.\w+\.\w+ to model\.x\.\w+",
        ),
        ({"model.head": "model.encoder"}, r"does not fit the state"),
    ],
)
def test_what_cannot_be_renamed_changes_nothing(rename: dict[str, str], words: str, tmp_path: Path) -> None:
    save(tmp_path, trained("encoder", "head", 2))
    live = trained("encoder", "head", 0)
    before = photograph(live)
    with pytest.raises(StateMismatchError, match=words):
        restore(tmp_path, live, rename)
    assert differences(photograph(live), before) == []


@pytest.mark.parametrize("rename", ["model", ["a"], {"a": 1}, {"a": ""}, {1: "a"}])
def test_a_rename_maps_text_to_text(rename: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it must be a dict from saved names to names in the state"):
        restore(tmp_path, {"a": {}}, rename)


class Scaled(nn.Module):
    """CLIP's: a temperature that is a parameter of the model, and elsewhere a loose one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.head = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.rand(()))


def with_loose_scale() -> State:
    body, head, scale = nn.Linear(3, 2), nn.Linear(2, 2), nn.Parameter(torch.rand(()))
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters(), scale])
    return {"body": body, "head": head, "scale": scale, "optimizer": optimizer}


def with_own_scale() -> State:
    module = Scaled()
    return {"model": module, "optimizer": torch.optim.AdamW(module.parameters())}


def test_a_loose_parameter_moves_into_a_module_and_out_of_it(tmp_path: Path) -> None:
    loose, own, again = with_loose_scale(), with_own_scale(), with_loose_scale()
    for _ in range(2):
        (loose["head"](loose["body"](torch.randn(4, 3))).square().mean() * loose["scale"].exp()).backward()
        loose["optimizer"].step()
    with Checkpointer(tmp_path, loose) as checkpointer:
        checkpointer.save(1).result()
    with Checkpointer(tmp_path, own) as checkpointer:
        checkpointer.restore(rename={name: f"model.{name}" for name in ("body", "head", "scale")})
        checkpointer.save(2).result()
    model = own["model"]
    assert torch.equal(model.scale, loose["scale"])
    assert torch.equal(model.body.weight, loose["body"].weight)
    ours, theirs = (one["optimizer"].state for one in (own, loose))
    assert torch.equal(ours[model.scale]["exp_avg"], theirs[loose["scale"]]["exp_avg"])
    with Checkpointer(tmp_path, again, read_only=True) as checkpointer:
        checkpointer.restore(rename={f"model.{name}": name for name in ("body", "head", "scale")})
    assert differences(photograph(again), photograph(loose)) == []


def test_values_take_the_place_of_others(tmp_path: Path) -> None:
    saved = {"a": {"n": 1}, "n": {"n": 2}, "model": Body(), "z": Body()}
    saved["model"].calls, saved["z"].calls = 3, 4  # type: ignore[union-attr]
    save(tmp_path, saved)
    values, body = {"n": 0}, Body()
    restore(tmp_path, {"n": values, "z": body}, {"a": "n", "model": "z"})
    assert values == {"n": 1}
    assert body.calls == 3


@pytest.mark.parametrize("strict", [True, False])
def test_a_key_that_was_given_away_brings_nothing_of_its_own(strict: bool, tmp_path: Path) -> None:
    """An average without the buffers must not get those of the model that it takes the place of."""
    model, average = nn.BatchNorm1d(2), nn.LayerNorm(2)
    nn.init.constant_(average.weight, 3.0)
    nn.init.constant_(model.running_mean, 7.0)  # type: ignore[arg-type]
    with Checkpointer(tmp_path, {"model": model, "ema": average}) as checkpointer:
        checkpointer.save(1).result()
    live = nn.BatchNorm1d(2)
    with Checkpointer(tmp_path, {"model": live}, read_only=True) as checkpointer:
        if strict:
            with pytest.raises(StateMismatchError, match=r"missing in the checkpoint \(3\)"):
                checkpointer.restore(rename={"ema": "model"})
            return
        checkpointer.restore(rename={"ema": "model"}, strict=False)
    assert live.weight.tolist() == [3, 3]
    assert live.running_mean is not None
    assert live.running_mean.tolist() == [0, 0]
