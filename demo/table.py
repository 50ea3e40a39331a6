"""The demo's loss table, as text from two lists of events. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from demo.job import Event, steps_of


@dataclass(frozen=True, slots=True)
class Row:
    """One step of both runs; losses are mean cross-entropies in nats."""

    step: int
    uninterrupted: float
    resumed: float

    @property
    def difference(self) -> float:
        """Relative to the uninterrupted run."""
        return abs(self.resumed - self.uninterrupted) / abs(self.uninterrupted)


def compare(uninterrupted: Iterable[Event], resumed: Iterable[Event]) -> list[Row]:
    """A row for every step of the uninterrupted run.

    Raises:
        ValueError: the two runs have different steps.
    """
    one, two = steps_of(uninterrupted), steps_of(resumed)
    if one.keys() != two.keys():
        lacking = sorted(one.keys() ^ two.keys())
        raise ValueError(f"these steps are in only one of the runs: {lacking}")
    return [Row(step, one[step]["loss"], two[step]["loss"]) for step in sorted(one)]


def render(rows: list[Row], *, resumed_after: int, ranks: tuple[int, int], every: int) -> str:
    """The table: every `every`-th step, the first and the last, and those around the resume."""
    shown = {resumed_after, resumed_after + 1, rows[0].step, rows[-1].step}
    lines = [
        f"{'step':>6}  {'uninterrupted':>14}  {'killed, resumed':>16}  {'on ranks':>8}  {'difference':>10}",
        f"{'-' * 6}  {'-' * 14}  {'-' * 16}  {'-' * 8}  {'-' * 10}",
    ]
    for row in rows:
        if row.step % every and row.step not in shown:
            continue
        on = ranks[0] if row.step <= resumed_after else ranks[1]
        difference = "none" if row.resumed == row.uninterrupted else f"{row.difference:.1e}"
        losses = f"{row.uninterrupted:>14.6f}  {row.resumed:>16.6f}"
        lines.append(f"{row.step:>6}  {losses}  {on:>8}  {difference:>10}")
        if row.step == resumed_after:
            lines.append(f"{'':>6}  {'killed here, resumed from this checkpoint':-^54}")
    return "\n".join(lines)
