"""The bars that Holdfast has set itself for saves. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.cases.modes.registry import HOLDFAST, SAVE_REFERENCE
from bench.cases.save.figures import RowSummary, Summary
from bench.harness.records import Spread, ratio
from bench.harness.report import Verdict, at_least, at_most


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a row beside its figures.

    Attributes:
        durable: whether what it calls done has been flushed.
        consistent_alone: whether its snapshot is complete when `save` returns.
    """

    durable: bool
    consistent_alone: bool


Figure = Callable[[RowSummary], Spread | None]


def verdicts(summary: Summary, facts: Mapping[str, Facts], *, cuda: bool) -> list[Verdict]:
    """Every figure of Holdfast's row against its bar; an empty list when Holdfast was not measured."""
    ours, reference = summary.rows.get(HOLDFAST), summary.rows.get(SAVE_REFERENCE)
    if ours is None or ours.lost is None:
        return []

    def best_peer(figure: Figure, counts: Callable[[Facts], bool]) -> tuple[float, str] | None:
        """The lowest median of the peers that count, and whose it is."""
        return min(
            (
                (spread.middle, name)
                for name, row in summary.rows.items()
                if name != HOLDFAST and counts(facts[name]) and (spread := figure(row))
            ),
            default=None,
        )

    memory, growth = ours.memory, ours.growth
    found = [
        at_most("blocked / copy floor", ratio(ours.blocked, summary.copy_floor), 1.3),
        _against_peer(
            "blocked, best peer with a consistent snapshot",
            ours.blocked,
            best_peer(lambda row: row.blocked, lambda fact: fact.consistent_alone),
            equal=True,
        ),
        at_most(
            f"training lost / {SAVE_REFERENCE}'s",
            ratio(ours.lost, reference.lost if reference else None),
            0.1,
        ),
        _against_peer("training lost, best peer", ours.lost, best_peer(lambda row: row.lost, lambda _: True)),
        at_most("durable while training / idle", ratio(ours.stored_training, ours.stored_idle), 2.0),
        at_most("durable, idle / raw write", ratio(ours.stored_idle, summary.write_floor), 1.15),
        _against_peer(
            "durable, idle, best peer that flushes",
            ours.stored_idle,
            best_peer(lambda row: row.stored_idle, lambda fact: fact.durable),
        ),
        at_most(f"CPU / {SAVE_REFERENCE}'s", ratio(ours.cpu, reference.cpu if reference else None), 0.2),
        at_most("host memory / bytes this rank writes", memory.share if memory else None, 1.1),
        at_most("memory growth over the saves", 100 * growth.share if growth else None, 1.0, "%"),
    ]
    if growth is not None and len(growth.written_bytes) > 1:
        found.append(at_most("largest / mean bytes a rank writes", growth.balance, 1.05))
    return found + (_cuda(ours, summary) if cuda else [])


def _cuda(ours: RowSummary, summary: Summary) -> list[Verdict]:
    stream = ours.stream.middle * 1e3 if ours.stream else None
    # Two events with nothing between them can show a tenth of a millisecond.
    noise = summary.none_stream.high * 1e3 + 0.1 if summary.none_stream else None
    slowed = 100 * ours.lost.middle / (5 * summary.step.middle) if ours.lost and summary.step else None
    return [
        at_most("compute stream held back", stream, noise, "ms"),
        at_least("copy bandwidth / pinned copy_", ratio(summary.copy_floor, ours.copied_idle), 0.9),
        at_most("slower with a save every 5 steps", slowed, 1.0, "%"),
    ]


def _against_peer(
    figure: str, ours: Spread | None, peer: tuple[float, str] | None, *, equal: bool = False
) -> Verdict:
    """Ours has to be below the best peer's figure; `equal`: or equal to it."""
    value = ours.middle if ours else None
    if value is None or peer is None:
        return Verdict(figure, value, None, "s", None, "no peer to compare with")
    limit, name = peer
    return Verdict(figure, value, limit, "s", value <= limit if equal else value < limit, name)
