"""Holdfast's figures against their bars, and the tables that show them."""

from __future__ import annotations

import dataclasses

import pytest

from bench.cases.save.bars import Facts, verdicts
from bench.cases.save.figures import RowSummary, Summary
from bench.cases.save.records import Growth, Memory
from bench.cases.save.report import tables
from bench.harness.records import Failure, Spread
from bench.harness.report import Verdict, failure_list, markdown, times, verdict_table


def one(value: float) -> Spread:
    return Spread(value, value, value, 1)


def row(name: str, **figures: float) -> RowSummary:
    empty: dict[str, object] = {field.name: None for field in dataclasses.fields(RowSummary)}
    return RowSummary(**{**empty, "name": name, **{k: one(v) for k, v in figures.items()}})  # type: ignore[arg-type]


OURS = dataclasses.replace(
    row("holdfast", lost=0.3, blocked=0.12, stored_training=1.0, stored_idle=0.55, cpu=0.3),
    memory=Memory("holdfast", 105, 100, 100),
    growth=Growth("holdfast", 100, 10, 1000, 5, (52, 48)),
)
PEERS = (
    row("dcp.async_save", lost=4.0, blocked=0.6, stored_training=4.0, stored_idle=2.0, cpu=2.0),
    row("torch_checkpointing", lost=1.0, blocked=0.01, stored_training=1.0, stored_idle=0.4, cpu=1.0),
    row("torch_checkpointing + fsync", lost=2.0, blocked=0.01, stored_training=3.0, stored_idle=0.9, cpu=1.0),
)
FACTS = {
    "holdfast": Facts(durable=True, consistent_alone=True),
    "dcp.async_save": Facts(durable=True, consistent_alone=True),
    "torch_checkpointing": Facts(durable=False, consistent_alone=False),
    "torch_checkpointing + fsync": Facts(durable=True, consistent_alone=False),
}


def summary(ours: RowSummary = OURS, peers: tuple[RowSummary, ...] = PEERS) -> Summary:
    rows = {line.name: line for line in (*peers, ours)}
    return Summary(rows, one(0.5), one(0.001), one(0.1), one(0.5), "O_DIRECT")


def outcome(changed: Summary, figure: str, *, cuda: bool = False) -> Verdict:
    (found,) = [verdict for verdict in verdicts(changed, FACTS, cuda=cuda) if verdict.figure == figure]
    return found


def test_a_good_run_reaches_every_bar() -> None:
    found = verdicts(summary(), FACTS, cuda=False)
    assert [verdict.figure for verdict in found if verdict.reached is not True] == []
    assert len(found) == 11


@pytest.mark.parametrize(
    ("figure", "change"),
    [
        ("blocked / copy floor", {"blocked": one(0.131)}),
        ("blocked, best peer with a consistent snapshot", {"blocked": one(0.61)}),
        ("training lost / dcp.async_save's", {"lost": one(0.41)}),
        ("training lost, best peer", {"lost": one(1.0)}),
        ("durable while training / idle", {"stored_training": one(1.2)}),
        ("durable, idle / raw write", {"stored_idle": one(0.58)}),
        ("durable, idle, best peer that flushes", {"stored_idle": one(0.9)}),
        ("CPU / dcp.async_save's", {"cpu": one(0.41)}),
        ("host memory / bytes this rank writes", {"memory": Memory("holdfast", 111, 100, 100)}),
        ("memory growth over the saves", {"growth": Growth("holdfast", 100, 10, 1000, 11, (50, 50))}),
        ("largest / mean bytes a rank writes", {"growth": Growth("holdfast", 100, 10, 1000, 0, (53, 47))}),
    ],
)
def test_each_bar_can_be_missed(figure: str, change: dict[str, object]) -> None:
    assert outcome(summary(dataclasses.replace(OURS, **change)), figure).reached is False  # type: ignore[arg-type]


def test_only_peers_of_the_same_promise_count() -> None:
    """The faster peer needs its caller's help, and flushes nothing: it sets neither bar."""
    assert outcome(summary(), "blocked, best peer with a consistent snapshot").note == "dcp.async_save"
    assert outcome(summary(), "durable, idle, best peer that flushes").note == "torch_checkpointing + fsync"
    assert outcome(summary(), "training lost, best peer").note == "torch_checkpointing"


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    alone = summary(peers=())
    assert outcome(alone, "training lost / dcp.async_save's").reached is None
    assert outcome(alone, "training lost, best peer").reached is None
    assert verdicts(Summary({}, None, None, None, None, ""), FACTS, cuda=False) == []


@pytest.mark.parametrize(
    ("stream", "copied_idle", "lost", "reached"),
    [(0.0005, 0.11, 0.02, [True, True, True]), (0.005, 0.12, 0.03, [False, False, False])],
)
def test_bars_on_cuda(stream: float, copied_idle: float, lost: float, reached: list[bool]) -> None:
    ours = dataclasses.replace(OURS, stream=one(stream), copied_idle=one(copied_idle), lost=one(lost))
    found = verdicts(summary(ours), FACTS, cuda=True)
    assert [verdict.reached for verdict in found[-3:]] == reached


def test_tables_show_every_row_and_mark_what_is_not_flushed() -> None:
    text = tables(summary(), FACTS)
    assert text.count("| dcp.async_save ") == 2
    assert "| torch_checkpointing † " in text
    assert "| torch_checkpointing + fsync †" not in text
    assert "0.30 (0.30 - 0.30)" in text


def test_failures_are_listed_with_their_error() -> None:
    text = failure_list([Failure("torchsnapshot", "opening it", "ImportError: no")])
    assert "- torchsnapshot, opening it: ImportError: no" in text


def test_verdicts_are_told_apart() -> None:
    text = verdict_table(
        [
            Verdict("a", 1.0, 2.0, "x", True),
            Verdict("b", 3.0, 2.0, "s", False, "dcp.save"),
            Verdict("c", None, 2.0, "x", None),
            Verdict("d", 0.95, 0.9, "x", True, bound="at least"),
        ]
    )
    a, b, c, d = text.splitlines()[2:]
    assert a.endswith("reached |")
    assert "MISSED" in b
    assert "2 s (dcp.save)" in b
    assert "not measured" in c
    assert "at least 0.9 x" in d


def test_markdown_lines_up() -> None:
    lines = markdown(["a", "bb"], [["long one", "1"], ["x", "22222"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("|:-")
    assert lines[1].endswith("-:|")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.123, "0.12"), (12.3, "12"), (-0.5, "-0.50"), (9.999, "10.00")]
)
def test_ratios_in_few_digits(value: float | None, text: str) -> None:
    assert times(value) == text
