"""Entries that are no modules: every kind comes back into the object that the loop goes on with."""

from __future__ import annotations

import collections
import enum
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import RestoreFailedError, StateMismatchError, UnsavableValueError
from engine.restore.trial import refusal
from engine.state import rng
from engine.state.entry_kinds import reseed

State = dict[str, Any]


class Phase(enum.Enum):
    WARM = 1


def through(directory: Path, saved: Any, live: Any) -> Any:
    """Save one entry and restore it into another object."""
    with Checkpointer(directory, {"e": saved}) as checkpointer:
        checkpointer.save(1).result()
    with Checkpointer(directory, {"e": live}, read_only=True) as checkpointer:
        checkpointer.restore()
    return live


BITS = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)


def torch_draw(generator: torch.Generator) -> list[float]:
    return torch.rand(5, generator=generator).tolist()


GENERATORS: dict[str, tuple[Any, Any]] = {
    "torch": (lambda seed: torch.Generator().manual_seed(seed), torch_draw),
    "python": (random.Random, lambda own: [own.gauss(0, 1) for _ in range(3)]),
    "legacy": (np.random.RandomState, lambda own: own.standard_normal(3).tolist()),
    **{
        kind.__name__: (
            lambda seed, kind=kind: np.random.Generator(kind(seed)),
            lambda own: [*own.standard_normal(3), *own.integers(0, 9, 3, dtype=np.uint8)],
        )
        for kind in BITS
    },
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    make, draw = GENERATORS[kind]
    saved = make(1)
    draw(saved)
    live = make(2)
    draw(live)
    with Checkpointer(tmp_path, {"e": saved}) as checkpointer:
        checkpointer.save(1).result()
    expected = [draw(saved) for _ in range(3)]
    with Checkpointer(tmp_path, {"e": live}, read_only=True) as checkpointer:
        checkpointer.restore()
    assert [draw(live) for _ in range(3)] == expected


def test_the_children_of_a_generator_are_numbered_on(tmp_path: Path) -> None:
    saved, live = np.random.default_rng(1), np.random.default_rng(2)
    saved.spawn(3)
    through(tmp_path, saved, live)
    assert live.spawn(1)[0].random() == saved.spawn(1)[0].random()


def test_a_generator_of_another_kind_is_refused(tmp_path: Path) -> None:
    live = np.random.Generator(np.random.Philox(1))
    before = live.bit_generator.state
    with pytest.raises(StateMismatchError, match=r"e: saved as .*Generator of PCG64, here a .*Philox"):
        through(tmp_path, np.random.default_rng(0), live)
    assert str(live.bit_generator.state) == str(before)


def test_generators_come_after_what_draws_from_them(tmp_path: Path) -> None:
    class Draws:
        def __init__(self, own: random.Random) -> None:
            self.own = own

        def state_dict(self) -> State:
            return {"drawn": self.own.random(), "t": torch.ones(1)}

        def load_state_dict(self, state: State) -> None:
            self.own.random()

    saved, live = random.Random(1), random.Random(2)
    with Checkpointer(tmp_path, {"a": saved, "z": Draws(saved)}) as checkpointer:
        expected = saved.getstate()
        checkpointer.save(1).result()
    with Checkpointer(tmp_path, {"a": live, "z": Draws(live)}, read_only=True) as checkpointer:
        checkpointer.restore()
    assert live.getstate() == expected


def test_a_rank_that_is_new_gets_a_stream_of_its_own() -> None:
    for make, draw in GENERATORS.values():
        first, second, again = make(0), make(0), make(7)
        for own, rank in ((first, 0), (second, 1), (again, 0)):
            reseed(own, rng.derived_seed(3, 5, rank, "e"))
        drawn = draw(first)
        assert drawn == draw(again)
        assert drawn != draw(second)


CONTAINERS = [
    (np.arange(6.0).reshape(2, 3), np.zeros((2, 3))),
    ({"b": 1, "a": (2, {3})}, {"c": 1}),
    ([1, Phase.WARM], [2, 3, 4]),
    ({1, 2}, {3}),
    (collections.deque([1, 2], maxlen=3), collections.deque([5], maxlen=3)),
    (bytearray(b"abc"), bytearray(b"x")),
    (collections.OrderedDict(b=1, a=2), collections.OrderedDict(a=0)),
    (collections.Counter("aab"), collections.Counter("z")),
    (collections.defaultdict(lambda: 5, a=1), collections.defaultdict(lambda: 5)),
]


@pytest.mark.parametrize(("saved", "live"), CONTAINERS, ids=lambda value: type(value).__name__)
def test_a_container_is_filled_in_place(saved: Any, live: Any, tmp_path: Path) -> None:
    assert through(tmp_path, saved, live) is live
    assert type(live) is type(saved)
    if isinstance(saved, np.ndarray):
        assert live.tobytes() == saved.tobytes()
    else:
        assert live == saved
        assert isinstance(saved, set) or list(live) == list(saved), "in the same order"
    if isinstance(live, collections.defaultdict):
        assert live["new"] == 5, "the live one keeps what makes its missing values"


def test_a_container_keeps_its_own_tensors(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(3))
    live = {"w": weight, "more": [torch.zeros(2)], "n": 0}
    inner = live["more"][0]  # type: ignore[index]
    through(tmp_path, {"w": torch.ones(3), "more": [torch.ones(2)], "n": 1}, live)
    assert live["w"] is weight
    assert weight.requires_grad
    assert weight.tolist() == [1, 1, 1]
    assert live["more"][0] is inner  # type: ignore[index]


@pytest.mark.parametrize(
    ("saved", "live", "words"),
    [
        (np.zeros(2), np.zeros(3), r"e: saved as <f8 \[2\], here <f8 \[3\]"),
        (np.zeros(2, np.float32), np.zeros(2), r"e: saved as <f4 \[2\], here <f8 \[2\]"),
        (np.zeros(2), np.broadcast_to(np.zeros(1), 2), "e: a read-only array here"),
        ([1], {"a": 1}, "e: a dict here, saved as another kind of value"),
        ({1}, [1], "e: a list here, saved as another kind of value"),
        ({"a": 1}, bytearray(), "e: a bytearray here, saved as another kind"),
        ([1], random.Random(1), r"e: saved as another kind of value, here a random\.Random"),
    ],
)
def test_another_kind_is_refused_before_anything_changes(
    saved: Any, live: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(StateMismatchError, match=words):
        through(tmp_path, saved, live)


class OneWay:
    def state_dict(self) -> State:
        return {}


@pytest.mark.parametrize("entry", [5, "text", 1.5, object(), OneWay(), random.SystemRandom(), (1, 2), None])
def test_what_cannot_be_restored_in_place_is_refused_at_once(entry: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsavableValueError, match=f"'e' is a {type(entry).__name__}; entries are"):
        Checkpointer(tmp_path / "new", {"e": entry})
    assert not (tmp_path / "new").exists()


class Picky:
    """Takes no other number than its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.loaded = 0
        self.seen: list[int] = []
        self.own = random.Random(0)

    def state_dict(self) -> State:
        return {"number": self.number}

    def load_state_dict(self, state: State) -> None:
        self.loaded += 1
        self.seen.append(state["number"])
        self.own.random()
        random.random()
        if state["number"] != self.number:
            raise ValueError(f"not {self.number}")


def test_what_an_entry_refuses_is_found_before_weights_are_overwritten(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with Checkpointer(tmp_path, {"model": model, "picky": Picky(1)}) as checkpointer:
        checkpointer.save(1).result()
    live, picky = nn.Linear(2, 2), Picky(2)
    weight, streams, own = live.weight.detach().clone(), random.getstate(), picky.own.getstate()
    with Checkpointer(tmp_path, {"model": live, "picky": picky}) as checkpointer:
        with pytest.raises(StateMismatchError, match=r"picky: its load_state_dict .* \(ValueError: not 2\)"):
            checkpointer.restore()
        assert torch.equal(live.weight, weight)
        assert (picky.loaded, picky.seen) == (0, []), "a stand-in was tried"
        assert random.getstate() == streams
        assert picky.own.getstate() == own
        checkpointer.save(2).result()
    fits = Picky(1)
    with Checkpointer(tmp_path, {"model": live, "picky": fits}, read_only=True) as checkpointer:
        checkpointer.restore("step:1")
    assert fits.loaded == 1, "handed over once"
    assert torch.equal(live.weight, model.weight)


@pytest.mark.parametrize(("saved", "live"), [(False, True), (True, False)])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_grad_scaler_that_is_switched_on_or_off_is_refused(
    saved: bool, live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (saved, live)]
    model = nn.Linear(2, 2)
    with Checkpointer(tmp_path, {"model": nn.Linear(2, 2), "scaler": made[0]}) as checkpointer:
        checkpointer.save(1).result()
    weight = model.weight.detach().clone()
    with Checkpointer(tmp_path, {"model": model, "scaler": made[1]}, read_only=True) as checkpointer:
        with pytest.raises(StateMismatchError, match=r"scaler: (its load_state_dict|saved by an enabled)"):
            checkpointer.restore()
        assert torch.equal(model.weight, weight)
        assert checkpointer.restore(exclude=["scaler"]) is not None


def test_what_breaks_off_says_what_was_restored(tmp_path: Path) -> None:
    class Late(Picky):
        def state_dict(self) -> State:
            return {**super().state_dict(), "t": torch.ones(1)}

    saved = {"first": {"n": 1}, "late": Late(1), "z": {"n": 1}}
    with Checkpointer(tmp_path, saved) as checkpointer:
        checkpointer.save(1).result()
    state: State = {"first": {"n": 0}, "late": Late(2), "z": {"n": 0}}
    with (
        Checkpointer(tmp_path, state, read_only=True) as checkpointer,
        pytest.raises(RestoreFailedError) as caught,
    ):
        checkpointer.restore()
    text = str(caught.value)
    assert "late did not accept what was saved (ValueError: not 2)" in text
    assert "Restored: all tensors of modules and optimizers, first. " in text
    assert "Not restored: late, z, the random number generators" in text
    assert (state["first"], state["z"]) == ({"n": 1}, {"n": 0})


def test_a_class_that_is_missing_here_is_found_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = {"phase": None}
    saved = {"phase": Phase.WARM}
    with Checkpointer(tmp_path, {"e": saved}) as checkpointer:
        checkpointer.save(1).result()
    with Checkpointer(tmp_path, {"e": live}, read_only=True) as checkpointer:
        monkeypatch.delitem(globals(), "Phase")
        with pytest.raises(StateMismatchError, match="e: a value of the class Phase was saved"):
            checkpointer.restore()
        assert live == {"phase": None}
        monkeypatch.undo()
        checkpointer.restore()
    assert live == saved


class Counted(nn.Module):
    """A module whose extra state holds what JSON lacks."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_may_hold_arrays_and_enums(tmp_path: Path) -> None:
    saved = Counted({"array": np.arange(3), "phase": Phase.WARM, "set": {1}})
    live = through(tmp_path, saved, Counted(None))
    assert live.extra["array"].tolist() == [0, 1, 2]
    assert (live.extra["phase"], live.extra["set"]) == (Phase.WARM, {1})


class Slotted:
    """A plain copy does not stand for it."""

    __slots__ = ("__dict__", "number")

    def __init__(self, number: int) -> None:
        self.number = number

    def state_dict(self) -> State:
        return {"number": self.number}

    def load_state_dict(self, state: State) -> None:
        if state["number"] < self.number:
            raise ValueError("less")
        self.number = state["number"]


class Registered:
    """Only what was made by its constructor may be loaded."""

    known: ClassVar[set[int]] = set()

    def __init__(self, number: int) -> None:
        self.number = number
        self.known.add(id(self))

    def state_dict(self) -> State:
        return {"number": self.number}

    def load_state_dict(self, state: State) -> None:
        if id(self) not in self.known:
            raise LookupError("a stranger")
        self.number = state["number"]


class Loader(Picky):
    def __iter__(self) -> Any:
        return iter(())


class Closing(Picky):
    def __del__(self) -> None:
        self.seen.append(-1)


@pytest.mark.parametrize("kind", [Slotted, Registered])
def test_what_a_copy_does_not_stand_for_is_restored_without_a_trial(kind: Any, tmp_path: Path) -> None:
    assert through(tmp_path, kind(5), kind(2)).number == 5


@pytest.mark.parametrize("kind", [Loader, Closing])
def test_loaders_and_what_closes_itself_are_not_tried(kind: Any) -> None:
    entry = kind(2)
    assert refusal(entry, {"number": 1}) == ""
    assert (entry.seen, entry.loaded) == ([], 0)


def test_a_trial_touches_nothing_that_the_entry_holds() -> None:
    picky = Picky(2)
    model = nn.Linear(2, 2)
    picky.inner, picky.model = Picky(2), model  # type: ignore[attr-defined]
    picky.many = {"list": [1, [2]], "tensor": torch.ones(2)}  # type: ignore[attr-defined]

    loaded: list[State] = []

    class Nested(Picky):
        def load_state_dict(self, state: State) -> None:
            self.inner.load_state_dict({"number": 2})  # type: ignore[attr-defined]
            self.many["list"][1].append(3)  # type: ignore[attr-defined]
            self.many["tensor"].zero_()  # type: ignore[attr-defined]
            assert self.model is model  # type: ignore[attr-defined]

    picky.__class__ = Nested
    assert refusal(picky, {"number": 2}) == ""
    assert picky.inner.loaded == 0  # type: ignore[attr-defined]
    assert picky.many["list"] == [1, [2]]  # type: ignore[attr-defined]
    assert picky.many["tensor"].tolist() == [1, 1]  # type: ignore[attr-defined]
    picky.load_state_dict = loaded.append  # type: ignore[method-assign]
    assert refusal(picky, {"number": 2}) == ""
    assert loaded == [], "it would be the entry itself that is loaded"
