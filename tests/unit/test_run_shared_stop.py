"""Ranks agree: one rank's error reaches all, and one reduction carries loss and votes. No ranks here."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.errors import ConfigError, PeerFailedError
from engine.run import trainer
from engine.run import world as ranks
from engine.run.config import TrainConfig
from engine.run.preemption import Preemption, Request
from engine.run.shared_stop import Agreement, Stopped
from engine.run.start import Restart
from engine.run.world import World, choose_device

INT, TERM = int(signal.SIGINT), int(signal.SIGTERM)
USR1, USR2 = int(signal.SIGUSR1), int(signal.SIGUSR2)
Outcome = tuple[str | None, int | None]


def alone(signum: int | None = None) -> Agreement:
    return Agreement(0, 1, lambda: signum)


class Among:
    """Makes rank 1 of 3, whose other two say what the test gives them; `reported` is what rank 1 said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.reported: list[Outcome] = []

    def __call__(
        self, rank0: Outcome = (None, None), rank2: Outcome = (None, None), signum: int | None = None
    ) -> Agreement:
        def gather(everyone: list[Any], mine: Outcome) -> None:
            self.reported.append(mine)
            everyone[:] = [rank0, mine, rank2]

        self.monkeypatch.setattr(dist, "all_gather_object", gather)
        return Agreement(1, 3, lambda: signum)


@pytest.fixture
def among(monkeypatch: pytest.MonkeyPatch) -> Among:
    return Among(monkeypatch)


def refuse() -> int:
    raise ConfigError("no such thing")


def test_alone_an_error_is_just_raised() -> None:
    agreement = alone()
    with pytest.raises(ConfigError):
        agreement.together(refuse)
    assert agreement.failed
    assert agreement.together(lambda: 7) == 7
    assert not agreement.failed


def test_none_is_a_result_too() -> None:
    assert alone().together(lambda: None) is None
    assert alone().from_first(lambda: None) is None


def test_the_failing_rank_keeps_its_own_error(among: Among) -> None:
    agreement = among()
    with pytest.raises(ConfigError, match=r"^no such thing$"):
        agreement.together(refuse)
    assert agreement.failed


def test_the_others_hear_which_rank_it_was_and_why(among: Among) -> None:
    agreement = among(rank2=("no such thing", None))
    with pytest.raises(PeerFailedError, match=r"^rank 2: no such thing$"):
        agreement.together(lambda: 7)
    assert agreement.failed, "rank 0 speaks for all"


def test_a_bug_of_one_rank_does_not_leave_the_others_waiting(among: Among) -> None:
    with pytest.raises(ZeroDivisionError):
        among().together(lambda: 1 // 0)
    assert among.reported == [("integer division or modulo by zero", None)]


@pytest.mark.parametrize(("mine", "theirs"), [(TERM, None), (None, TERM)], ids=["here", "there"])
def test_a_signal_before_the_first_step_stops_all(among: Among, mine: int | None, theirs: int | None) -> None:
    with pytest.raises(Stopped) as stopped:
        among(rank0=(None, theirs), signum=mine).together(lambda: 7)
    assert stopped.value.signum == TERM


def test_a_signal_that_was_answered_stops_nothing(among: Among) -> None:
    assert among(signum=TERM).together(lambda: 7, heed_signals=False) == 7


def test_an_error_outranks_a_signal(among: Among) -> None:
    """torchrun sends SIGTERM to the rest when one rank ends: the reason must still be told."""
    with pytest.raises(ConfigError):
        among(signum=TERM).together(refuse)


def test_the_first_rank_asks_for_all(monkeypatch: pytest.MonkeyPatch, among: Among) -> None:
    def broadcast(box: list[Any], src: int) -> None:
        assert src == 0
        box[0] = "rank 0's answer"

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    asked: list[int] = []
    assert among().from_first(lambda: str(asked.append(1))) == "rank 0's answer"
    assert asked == []
    first = among()
    first.rank = 0
    first.from_first(lambda: str(asked.append(1)))
    assert asked == [1]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("signum", "stop", "expected"),
    [(None, False, (None, False)), (TERM, False, (TERM, False)), (INT, True, (INT, True))],
)
def test_a_vote_alone(signum: int | None, stop: bool, expected: tuple[int | None, bool]) -> None:
    vote = alone(signum).vote(scalar(0.1), stop=stop)
    assert vote.total == 0.1, "every bit"
    assert (vote.signum, vote.stop) == expected


@pytest.mark.parametrize(
    ("others", "signum", "stop"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0], None, False),
        ([0.0, 0.0, 0.0, 1.0, 0.0], TERM, False),
        ([2.0, 0.0, 0.0, 0.0, 0.0], INT, False),
        ([0.0, 3.0, 0.0, 0.0, 0.0], USR1, False),
        ([1.0, 0.0, 1.0, 0.0, 0.0], USR2, False),
        ([1.0, 1.0, 1.0, 1.0, 0.0], TERM, False),
        ([0.0, 0.0, 0.0, 0.0, 1.0], None, True),
    ],
    ids=str,
)
def test_one_reduction_carries_everything(
    monkeypatch: pytest.MonkeyPatch, others: list[float], signum: int | None, stop: bool
) -> None:
    """`others`: how many of the other ranks had SIGINT, SIGUSR1, SIGUSR2, SIGTERM, must stop."""
    calls: list[int] = []

    def all_reduce(packed: torch.Tensor) -> None:
        calls.append(packed.numel())
        packed += torch.tensor([0.25, *others], dtype=torch.float64)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    vote = Agreement(0, 4, lambda: None).vote(scalar(0.5))
    assert vote.total == 0.75
    assert (vote.signum, vote.stop) == (signum, stop)
    assert calls == [6]


def test_the_highest_value_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart that only one node's agent has counted is a restart of all ranks."""

    def all_reduce(box: torch.Tensor, op: object) -> None:
        assert op == dist.ReduceOp.MAX
        box.clamp_(min=2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert Agreement(0, 4, lambda: None).highest(0) == 2
    assert alone().highest(1) == 1


def test_rank_0_takes_itself_for_restarted_when_another_nodes_agent_has_counted_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Restart] = []

    def find_start(session: TrainConfig, *, directory_given: bool, restart: Restart) -> None:
        seen.append(restart)
        raise ConfigError("enough")

    monkeypatch.setattr(trainer, "find_start", find_start)
    monkeypatch.setattr(Agreement, "highest", lambda agreement, value: value + 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ConfigError, match="enough"):
        trainer.train([], TrainConfig(), alone(), Preemption(Request(25.0)), World())
    assert [restart.count for restart in seen] == [2]


@pytest.mark.parametrize(("local_world_size", "key"), [(2, "restart-3/met"), (1, "met")])
def test_restarted_ranks_of_one_node_have_a_store_of_their_own(
    local_world_size: int, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of several nodes do not: their agents count restarts apart, and they would never meet."""
    board = dist.HashStore()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    monkeypatch.setattr(ranks, "rendezvous", lambda *args, **more: iter([(board, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, *, store, **more: store.set("met", "1"))
    ranks.join(World(world_size=2, local_world_size=local_world_size), cuda=False)
    assert board.check([key])


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, World()),
        (
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            World(rank=3, local_rank=1, world_size=4, local_world_size=2),
        ),
    ],
    ids=["alone", "torchrun"],
)
def test_the_place_among_the_ranks(environ: dict[str, str], expected: World) -> None:
    assert World.from_environ(environ) == expected


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK is set but LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE is not"):
        World.from_environ({"RANK": "0"})
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "two", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two', which is not a number"):
        World.from_environ(given)


@pytest.mark.parametrize(("wanted", "cuda", "expected"), [("cpu", True, "cpu"), ("auto", False, "cpu")])
def test_the_device(monkeypatch: pytest.MonkeyPatch, wanted: str, cuda: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert choose_device(wanted, World()).type == expected


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cpu"):
        choose_device("cuda", World())


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="4 ranks on this node but 1 CUDA devices"):
        choose_device("auto", World(world_size=4, local_world_size=4))
