"""Selectors: what is understood, what answers, and what the errors say."""

from __future__ import annotations

import math
import random

import pytest

from engine.directory.retention import Retention, roles
from engine.directory.selectors import Selector, choose, parse_selector
from engine.errors import SelectorError
from tests.support.records import record

# A run to step 500 that went back to step 100 and branched: order is by sequence, not by step or clock.
BRANCHED = [
    record(1, step=100, loss=3.0, created=900.0),
    record(2, step=200, loss=2.5, reasons=("epoch",), epoch=1, created=800.0),
    record(3, step=500, loss=2.0, created=700.0),
    record(4, step=150, loss=math.nan, created=600.0),
    record(5, step=200, loss=2.9, reasons=("interval", "epoch"), epoch=1, created=500.0),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("latest", Selector("latest", "latest")),
        (" backup ", Selector("backup", "backup")),
        ("best", Selector("best", "best")),
        ("epoch:3", Selector("epoch", "epoch:3", 3)),
        ("step:0250", Selector("step", "step:0250", 250)),
        ("step-00000250-1f0c9a3e", Selector("id", "step-00000250-1f0c9a3e")),
        ("./step-00000250-1f0c9a3e", Selector("path", "./step-00000250-1f0c9a3e")),
        ("runs/a", Selector("path", "runs/a")),
        (
            "s3://bucket/run/step-00000250-1f0c9a3e",
            Selector("path", "s3://bucket/run/step-00000250-1f0c9a3e"),
        ),
        (".", Selector("path", ".")),
    ],
)
def test_parse(text: str, expected: Selector) -> None:
    assert parse_selector(text) == expected


@pytest.mark.parametrize(
    "text", ["", "latst", "LATEST", "epoch", "epoch:", "epoch:-1", "step:x", "step:1e3", "epoch:²"]
)
def test_what_is_no_selector_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(SelectorError, match=r"latest, backup, best, epoch:N, step:N"):
        parse_selector(text)


@pytest.mark.parametrize(
    ("text", "sequence"),
    [
        ("latest", 5),
        ("backup", 4),
        ("best", 3),
        ("epoch:1", 5),
        ("step:200", 5),
        ("step:500", 3),
        (BRANCHED[1].id, 2),
        (BRANCHED[0].path, 1),
        (BRANCHED[0].path + "/", 1),
    ],
)
def test_choose(text: str, sequence: int) -> None:
    shuffled = random.Random(1).sample(BRANCHED, len(BRANCHED))
    assert choose(shuffled, parse_selector(text)).sequence == sequence


def test_of_equal_losses_the_older_is_best() -> None:
    """An improvement is strict: the older one is the one that was saved with the reason `best`."""
    tied = [record(1, loss=2.0), record(2, loss=2.0), record(3, loss=2.1)]
    assert choose(tied, parse_selector("best")).sequence == 1


@pytest.mark.parametrize(
    ("records", "text", "why"),
    [
        ([], "latest", "nothing was committed"),
        ([record(1)], "backup", "there are fewer than two"),
        ([record(1, loss=math.inf), record(2)], "best", "none has a finite val_loss"),
        ([record(1, epoch=4)], "epoch:4", "no checkpoint closed epoch 4"),
        ([record(1)], "step:7", "no checkpoint at step 7"),
        ([record(1)], "step-00000001-ffffffff", "no checkpoint has this id"),
        ([record(1)], "/elsewhere/" + record(1).id, "no checkpoint at this path"),
    ],
)
def test_nothing_answers(records: list, text: str, why: str) -> None:
    with pytest.raises(SelectorError, match=why) as raised:
        choose(records, parse_selector(text))
    message = str(raised.value)
    assert repr(text) in message
    if records:
        assert f"step:{records[0].step} (" in message
    else:
        assert "There is no committed checkpoint" in message


def test_the_error_lists_what_there_is_newest_first() -> None:
    with pytest.raises(SelectorError) as raised:
        choose(BRANCHED, parse_selector("step:999"))
    assert str(raised.value).endswith(
        "Available: step:200 (latest, epoch:1); step:150 (backup); step:500 (best); step:200 (epoch:1);"
        " step:100"
    )


def test_a_long_list_is_cut_short() -> None:
    with pytest.raises(SelectorError, match=r"step:6 and 5 older ones$"):
        choose([record(n) for n in range(1, 26)], parse_selector("best"))


def test_roles() -> None:
    found = roles(BRANCHED, Retention(rolling=3, best=2))
    assert [found[r.id] for r in BRANCHED] == [
        (),
        ("best", "epoch"),
        ("best", "rolling"),
        ("backup", "rolling"),
        ("latest", "epoch", "rolling"),
    ]


def test_roles_where_everything_is_kept() -> None:
    assert roles([record(1)], None) == {record(1).id: ("latest", "rolling")}
    assert roles([], None) == {}
