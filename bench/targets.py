"""The figures that Holdfast has set itself, and whether a run reached them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.modes.registry import HOLDFAST, REFERENCE
from bench.summary import RowSummary, Spread, Summary, balance, growth_share, ratio


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a row beyond its figures."""

    durable: bool
    """Whether what it calls done has been flushed."""
    consistent_alone: bool
    """Whether its snapshot is whole when `save` returns."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure against its limit. `reached` is None where it could not be measured."""

    figure: str
    value: float | None
    limit: float | None
    unit: str
    reached: bool | None
    note: str = ""


def verdicts(summary: Summary, facts: Mapping[str, Facts], *, cuda: bool) -> list[Verdict]:
    """Every figure of Holdfast's row against its bar; an empty list when Holdfast was not measured."""
    ours = summary.rows.get(HOLDFAST)
    if ours is None or ours.lost is None:
        return []
    found = _training(ours, summary, facts) + _storage(ours, summary, facts) + _resources(ours, summary)
    return found + (_cuda(ours, summary) if cuda else [])


def _training(ours: RowSummary, summary: Summary, facts: Mapping[str, Facts]) -> list[Verdict]:
    reference = _reference(summary, lambda row: row.lost)
    blocked_peer = _best_peer(summary, facts, lambda row: row.blocked, lambda fact: fact.consistent_alone)
    lost_peer = _best_peer(summary, facts, lambda row: row.lost, lambda fact: True)
    return [
        _at_most("blocked / copy floor", ratio(ours.blocked, summary.copy_floor), 1.3, "x"),
        _below_peer("blocked, best peer with a consistent snapshot", ours.blocked, blocked_peer, equal=True),
        _at_most(
            f"training lost / {REFERENCE}'s",
            ratio(ours.lost, reference),
            0.1,
            "x",
        ),
        _below_peer("training lost, best peer", ours.lost, lost_peer),
    ]


def _storage(ours: RowSummary, summary: Summary, facts: Mapping[str, Facts]) -> list[Verdict]:
    peer = _best_peer(summary, facts, lambda row: row.stored_idle, lambda fact: fact.durable)
    return [
        _at_most("durable while training / idle", ratio(ours.stored_training, ours.stored_idle), 2.0, "x"),
        _at_most("durable, idle / raw write", ratio(ours.stored_idle, summary.write_floor), 1.15, "x"),
        _below_peer("durable, idle, best peer that flushes", ours.stored_idle, peer),
    ]


def _resources(ours: RowSummary, summary: Summary) -> list[Verdict]:
    reference = _reference(summary, lambda row: row.cpu)
    memory = ours.memory
    taken = memory.peak_bytes / memory.rank_bytes if memory else None
    growth = 100 * growth_share(ours.growth) if ours.growth else None
    found = [
        _at_most(f"CPU / {REFERENCE}'s", ratio(ours.cpu, reference), 0.2, "x"),
        _at_most("host memory / bytes this rank writes", taken, 1.1, "x"),
        _at_most("memory growth over the saves", growth, 1.0, "%"),
    ]
    if ours.growth is not None and len(ours.growth.written_bytes) > 1:
        found.append(_at_most("largest / mean bytes a rank writes", balance(ours.growth), 1.05, "x"))
    return found


def _cuda(ours: RowSummary, summary: Summary) -> list[Verdict]:
    noise = summary.none_stream
    stream = ours.stream.middle * 1e3 if ours.stream else None
    bandwidth = ratio(summary.copy_floor, ours.copied_idle)
    slowed = 100 * ours.lost.middle / (5 * summary.step.middle) if ours.lost and summary.step else None
    return [
        # A tenth of a millisecond is what two events without anything between them can show.
        _at_most("compute stream held back", stream, noise.high * 1e3 + 0.1 if noise else None, "ms"),
        Verdict(
            "copy bandwidth / pinned copy_",
            bandwidth,
            0.9,
            "x",
            None if bandwidth is None else bandwidth >= 0.9,
            "at least",
        ),
        _at_most("slower with a save every 5 steps", slowed, 1.0, "%"),
    ]


def _reference(summary: Summary, figure: Callable[[RowSummary], Spread | None]) -> Spread | None:
    row = summary.rows.get(REFERENCE)
    return figure(row) if row else None


def _best_peer(
    summary: Summary,
    facts: Mapping[str, Facts],
    figure: Callable[[RowSummary], Spread | None],
    counts: Callable[[Facts], bool],
) -> tuple[str, float] | None:
    """Name and median of the peer with the lowest figure, among those that count."""
    peers = [
        (spread.middle, name)
        for name, row in summary.rows.items()
        if name != HOLDFAST and counts(facts[name]) and (spread := figure(row)) is not None
    ]
    if not peers:
        return None
    value, name = min(peers)
    return name, value


def _at_most(figure: str, value: float | None, limit: float | None, unit: str) -> Verdict:
    reached = None if value is None or limit is None else value <= limit
    return Verdict(figure, value, limit, unit, reached)


def _below_peer(
    figure: str, ours: Spread | None, peer: tuple[str, float] | None, *, equal: bool = False
) -> Verdict:
    if ours is None or peer is None:
        return Verdict(figure, ours.middle if ours else None, None, "s", None, "no peer to compare with")
    name, limit = peer
    reached = ours.middle <= limit if equal else ours.middle < limit
    return Verdict(figure, ours.middle, limit, "s", reached, name)
