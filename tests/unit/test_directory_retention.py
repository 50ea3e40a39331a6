"""Retention as a table: what stays, what goes, and why."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Checkpointer
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention, decide_retention
from engine.errors import ConfigError
from tests.documents import ROOT
from tests.support.records import record


def kept(
    records: list[CheckpointRecord], retention: Retention | None, held: frozenset[str] = frozenset()
) -> list[int]:
    return [d.record.sequence for d in decide_retention(records, retention, held) if d.keep]


def plain(count: int) -> list[CheckpointRecord]:
    return [record(n) for n in range(1, count + 1)]


SCORED = [
    record(1, loss=2.0),
    record(2, loss=1.0),
    record(3, reasons=("interval", "epoch"), epoch=1),
    record(4, loss=1.5),
    record(5, loss=math.nan),
    record(6, loss=-math.inf),
    record(7),
    record(8),
]


@pytest.mark.parametrize(
    ("records", "retention", "expected"),
    [
        ([], Retention(), []),
        (plain(1), Retention(rolling=0), [1]),
        (plain(12), Retention(), list(range(3, 13))),
        (plain(5), Retention(rolling=3), [3, 4, 5]),
        (plain(5), Retention(rolling=0), [4, 5]),
        (plain(5), Retention(rolling=1), [4, 5]),
        (plain(5), None, [1, 2, 3, 4, 5]),
        (SCORED, Retention(rolling=2), [2, 3, 7, 8]),
        (SCORED, Retention(rolling=2, best=0), [2, 3, 7, 8]),
        (SCORED, Retention(rolling=2, best=2), [2, 3, 4, 7, 8]),
        (SCORED, Retention(rolling=2, best=9), [1, 2, 3, 4, 7, 8]),
        (SCORED, Retention(rolling=2, epochs=False), [2, 7, 8]),
    ],
)
def test_what_stays(
    records: list[CheckpointRecord], retention: Retention | None, expected: list[int]
) -> None:
    shuffled = random.Random(2).sample(records, len(records))
    assert kept(shuffled, retention) == expected


def test_held_ones_stay() -> None:
    records = plain(5)
    assert kept(records, Retention(rolling=1), frozenset({records[0].id})) == [1, 4, 5]


def test_order_is_by_sequence_not_by_step_or_clock() -> None:
    back = [
        record(1, step=500, created=9.0),
        record(2, step=600, created=8.0),
        record(3, step=100, created=1.0),
    ]
    assert kept(back, Retention(rolling=2)) == [2, 3]


def test_every_decision_says_why() -> None:
    records = [*SCORED, record(9, loss=3.0), record(10)]
    why = {d.record.sequence: d.why for d in decide_retention(records, Retention(rolling=3), {records[0].id})}
    assert why == {
        1: "held",
        2: "best (val loss 1)",
        3: "closed epoch 1",
        4: "older than the newest 3, val loss 1.5 is not best",
        5: "older than the newest 3, without a validation loss",
        6: "older than the newest 3, without a validation loss",
        7: "older than the newest 3, without a validation loss",
        8: "among the newest 3",
        9: "backup, among the newest 3",
        10: "latest, among the newest 3",
    }


@given(
    losses=st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=12),
    rolling=st.integers(0, 5),
    best=st.integers(0, 3),
    epochs=st.booleans(),
)
def test_latest_backup_and_best_never_go(
    losses: list[float | None], rolling: int, best: int, epochs: bool
) -> None:
    records = [record(n, loss=loss) for n, loss in enumerate(losses)]
    stays = set(kept(records, Retention(rolling, best, epochs)))
    finite = [n for n, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    assert {len(losses) - 1, max(0, len(losses) - 2)} <= stays
    if finite:
        assert min(finite, key=lambda n: losses[n]) in stays
    assert len(stays) <= max(2, rolling) + max(1, best), "nothing else stays"


@pytest.mark.parametrize(
    "bad", [{"rolling": -1}, {"best": -2}, {"rolling": 2.5}, {"best": True}, {"rolling": None}]
)
def test_a_policy_that_cannot_work_is_refused_with_its_number(bad: dict) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Retention(**bad)


def test_the_documents_say_what_the_default_deletes() -> None:
    default = Retention()
    assert (default.best, default.epochs, default.metric, default.mode) == (1, True, "val_loss", "min")
    for text in ((ROOT / "README.md").read_text(), str(Checkpointer.__doc__)):
        said = " ".join(text.split()).replace("`", '"')
        assert f'newest {default.rolling}, the one with the lowest "val_loss"' in said
        assert "after each commit" in said.lower()
    assert "is deleted after the next commit" in (ROOT / "docs" / "guide.md").read_text()
