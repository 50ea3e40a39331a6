"""What is read where, and what is handed over: nothing changes before everything fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from engine.errors import DamagedError, StateError, StateMismatchError
from engine.format.manifest import FileReceipt, Manifest, ShardReceipt, TensorInfo
from engine.restore.destination import Destination
from engine.restore.filters import Filter
from engine.state import values
from engine.state.capture import StateCapture
from engine.state.tensor_format import from_torch
from tests.support.training import differences, photograph

State = dict[str, Any]
DIGEST = "0123456789abcdef" * 2


def manifest_of(
    state: State, per_rank: tuple[str, ...] = (), world_size: int = 1
) -> tuple[Manifest, list[State]]:
    """The manifest and rank-local values of a checkpoint of this state, as every rank has it."""
    locals_, tensors, shards = [], {}, []
    for rank in range(world_size):
        captured = StateCapture(state, per_rank, rank).capture()
        locals_.append(captured.local)
        tensors |= {
            n: TensorInfo(from_torch(t.dtype, n), tuple(t.shape)) for n, t in captured.tensors.items()
        }
        files = (FileReceipt(f"shard-{rank:05d}.safetensors", 1 << 20, DIGEST),)
        shards.append(ShardReceipt(rank, files, FileReceipt(f"shard-{rank:05d}.json", 1, DIGEST)))
    manifest = Manifest(
        id="step-00000001-aaaaaaaa",
        sequence=1,
        step=1,
        created=0.0,
        reasons=("manual",),
        world_size=world_size,
        tensors=tensors,
        aliases=captured.aliases,
        objects=captured.shared,
        shards=tuple(shards),
    )
    return manifest, locals_


def destination(
    state: State,
    checkpoint: tuple[Manifest, list[State]],
    per_rank: tuple[str, ...] = (),
    rank: int = 0,
    world_size: int = 1,
    **filter: Any,
) -> Destination:
    return Destination(
        StateCapture(state, per_rank, rank),
        *checkpoint,
        rank=rank,
        world_size=world_size,
        seed=0,
        filter=Filter(**filter),
    )


def trained(network: nn.Module) -> State:
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": network, "optimizer": optimizer}


def fill(found: Destination, value: float) -> None:
    """In place of reading: every tensor gets one value, the generators' the one they have now."""
    generators = StateCapture({}, (), 0).capture().tensors
    for name, tensor in found.tensors.items():
        _, is_rng, rest = name.partition(".rng.")
        with torch.no_grad():
            tensor.copy_(
                generators[f"per_rank.00000.rng.{rest}"] if is_rng else torch.full_like(tensor, value)
            )


def test_live_tensors_are_filled_in_place() -> None:
    checkpoint = manifest_of(trained(nn.Linear(3, 2)))
    state = trained(nn.Linear(3, 2))
    found = destination(state, checkpoint)
    found.check("it")
    assert found.tensors["model.weight"].data_ptr() == state["model"].weight.data_ptr()
    moment = state["optimizer"].state[state["model"].bias]["exp_avg"]
    assert found.tensors["optimizer.state.bias.exp_avg"].data_ptr() == moment.data_ptr()
    assert found.sources["model.weight"] == "model.weight"
    assert {name for name in found.sources if name.startswith("per_rank")} == {
        "per_rank.00000.rng.python.words",
        "per_rank.00000.rng.numpy.keys",
        "per_rank.00000.rng.torch",
    }


def test_looking_changes_nothing() -> None:
    checkpoint = manifest_of(trained(nn.Linear(3, 2)))
    network = nn.Linear(3, 2)
    state = {"model": network, "optimizer": torch.optim.AdamW(network.parameters())}
    before = photograph(state)
    found = destination(state, checkpoint)
    assert "optimizer.state.weight.exp_avg" in found.tensors, "there is something to read into"
    assert differences(photograph(state), before) == []


def test_a_refusal_while_looking_leaves_no_trace_either() -> None:
    checkpoint = manifest_of({**trained(nn.Linear(3, 2)), "mine": {"n": 1}}, ("mine",), world_size=2)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    with pytest.raises(StateError, match="saved per rank by 2 ranks"):
        destination(
            {"model": network, "optimizer": optimizer, "mine": {}}, checkpoint, ("mine",), world_size=3
        )
    assert optimizer.state_dict()["state"] == {}


def tied() -> nn.ModuleDict:
    network = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    network["b"].weight = network["a"].weight
    return network


def test_tied_weights_are_read_once_and_untied_ones_twice_from_the_same_place() -> None:
    checkpoint = manifest_of({"model": tied()})
    one = destination({"model": tied()}, checkpoint)
    assert {n: s for n, s in one.sources.items() if n.startswith("model")} == {
        "model.a.weight": "model.a.weight"
    }
    apart = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    two = destination({"model": apart}, checkpoint)
    two.check("it")
    assert {n: s for n, s in two.sources.items() if n.startswith("model")} == {
        "model.a.weight": "model.a.weight",
        "model.b.weight": "model.a.weight",
    }
    fill(two, 3.0)
    assert bool((apart["a"].weight == 3).all())
    assert bool((apart["b"].weight == 3).all())


def test_values_are_handed_over_at_the_end_only() -> None:
    checkpoint = manifest_of(
        {"values": {"n": 5, "t": torch.zeros(2)}, "history": [1, 2], "scale": torch.zeros(3)}
    )
    state: State = {"values": {"n": 1, "t": torch.ones(2)}, "history": [], "scale": torch.ones(3)}
    mine = state["values"]["t"]
    found = destination(state, checkpoint)
    found.check("it")
    assert state["values"]["n"] == 1
    fill(found, 4.0)
    assert state["values"]["n"] == 1
    found.finish()
    assert state["values"]["n"] == 5
    assert state["history"] == [1, 2]
    assert mine.tolist() == [4, 4]
    assert state["values"]["t"].data_ptr() == mine.data_ptr()
    assert state["scale"].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("filter", "names"),
    [
        ({}, {"model", "optimizer", "values", "per_rank"}),
        ({"model_only": True}, {"model"}),
        ({"include": ("model.*",)}, {"model"}),
        ({"exclude": ("optimizer.*", "rng")}, {"model", "values"}),
        ({"include": ("values",)}, {"values"}),
    ],
)
def test_what_is_not_wanted_is_not_read(filter: State, names: set[str]) -> None:
    def make() -> State:
        return {**trained(nn.Linear(3, 2)), "values": {"t": torch.zeros(2)}}

    state = make()
    before = photograph(state)
    found = destination(state, manifest_of(make()), **filter)
    found.check("it")
    assert {name.partition(".")[0] for name in found.tensors} == names
    fill(found, 9.0)
    found.finish()
    after = photograph(state)
    for key in state:
        assert (differences(after[key], before[key]) == []) == (key not in names), key


def test_a_document_that_names_a_tensor_that_is_not_listed_is_damage() -> None:
    manifest, locals_ = manifest_of({"values": {"t": torch.zeros(2)}})
    broken = dataclasses.replace(manifest, objects={"values": {"t": {"$tensor": "values.other"}}})
    with pytest.raises(DamagedError, match=r"values\.other, which it does not list"):
        destination({"values": {}}, (broken, locals_))


def test_a_document_that_no_save_wrote_is_damage() -> None:
    manifest, locals_ = manifest_of({"values": {"n": 1}})
    broken = dataclasses.replace(manifest, objects={"values": {"n": {"$pickle": "gASV"}}})
    found = destination({"values": {}}, (broken, locals_))
    found.check("it")
    with pytest.raises(DamagedError, match="unknown form"):
        found.finish()


def test_another_world_size_reads_no_ranks_generators() -> None:
    checkpoint = manifest_of({"values": {"n": 1}}, world_size=2)
    found = destination({"values": {}}, checkpoint, rank=2, world_size=3)
    found.check("it")
    assert found.tensors == {}
    torch.manual_seed(1)
    found.finish()
    first = torch.rand(1).item()
    found.finish()
    assert torch.rand(1).item() == first, "derived from seed, step and rank"


class Resharding:
    def __init__(self) -> None:
        self.got: Any = None

    def state_dict(self) -> State:
        return {"t": torch.zeros(2), "n": 7}

    def load_state_dict(self, state: State) -> None:
        self.got = state

    def reshard(self, states: list[State], rank: int, world_size: int) -> State:
        return {
            "ranks": len(states),
            "rank": rank,
            "of": world_size,
            "sum": sum(float(s["t"].sum()) for s in states),
        }


def test_an_object_that_knows_how_gets_all_ranks_states() -> None:
    state = {"mine": Resharding()}
    checkpoint = manifest_of(state, ("mine",), world_size=3)
    found = destination(state, checkpoint, ("mine",), rank=1, world_size=2)
    found.check("it")
    assert sorted(found.sources) == [f"per_rank.{rank:05d}.mine.t" for rank in range(3)]
    fill(found, 1.0)
    found.finish()
    assert state["mine"].got == {"ranks": 3, "rank": 1, "of": 2, "sum": 6.0}


def test_at_the_same_world_size_it_gets_its_own() -> None:
    state = {"mine": Resharding()}
    found = destination(state, manifest_of(state, ("mine",), world_size=2), ("mine",), rank=1, world_size=2)
    found.check("it")
    fill(found, 2.0)
    found.finish()
    assert state["mine"].got["n"] == 7
    assert state["mine"].got["t"].tolist() == [2, 2]


def test_without_strictness_what_does_not_fit_keeps_its_values() -> None:
    """Nothing of another kind is forced upon an entry: not by broadcasting, not by an exception half-way."""
    saved: State = {"scale": torch.zeros(1), "table": [1], "mine": {"n": 1}, "good": {"n": 1}}
    state: State = {"scale": torch.full((3,), 2.0), "table": {"a": 1}, "mine": {"n": 2}, "good": {"n": 2}}
    checkpoint = manifest_of(saved)
    with pytest.raises(StateMismatchError):
        destination(state, checkpoint, ("mine",)).check("it")
    found = destination(state, checkpoint, ("mine",), strict=False)
    found.check("it")
    fill(found, 7.0)
    found.finish()
    assert state["scale"].tolist() == [2, 2, 2]
    assert state["table"] == {"a": 1}
    assert state["mine"] == {"n": 2}
    assert state["good"] == {"n": 1}


def test_every_tensor_of_a_document_is_among_those_to_read() -> None:
    state: State = {"values": [{"a": torch.zeros(1)}, (torch.zeros(2), {3: torch.zeros(3)})]}
    checkpoint = manifest_of(state)
    found = destination({"values": []}, checkpoint)
    names = values.tensor_names(checkpoint[0].objects["values"])
    assert set(names) <= set(found.tensors)
    assert len(names) == 3
