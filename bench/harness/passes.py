"""A small benchmark: a few passes timed in turn in one process, each repeat in an order of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench.harness.records import Spread, shuffled
from bench.harness.report import Report, Verdict, markdown, seconds, verdict_table


def run_passes(
    passes: Mapping[str, Callable[[int], float]], *, repeats: int, seed: int, untimed: int = 0
) -> dict[str, list[float]]:
    """The seconds that each pass returned in each repeat. Passes are given the number of the repeat.

    Args:
        untimed: repeats before the first one that counts, to warm up; the first of all has number 1.
    """
    secs: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(1, untimed + repeats + 1):
        for name in shuffled(passes, seed, number):
            taken = passes[name](number)
            if number > untimed:
                secs[name].append(taken)
    return secs


@dataclass
class PassesReport(Report):
    """Every sample of every pass. `facts`: what else the document records; names of passes are its keys."""

    facts: dict[str, Any]
    secs: dict[str, list[float]]

    def title(self) -> str:
        """What was measured, in a line."""
        raise NotImplementedError

    def verdicts(self) -> list[Verdict]:
        """The figures against their bars."""
        raise NotImplementedError

    def text(self) -> str:
        lines = [[name, seconds(Spread.of(secs), 4)] for name, secs in self.secs.items()]
        return "\n\n".join(
            [
                f"{self.title()}; medians (lowest - highest) of {self.options['repeats']} repeats",
                markdown(["pass", "seconds"], lines),
                verdict_table(self.verdicts()),
            ]
        )

    def document(self) -> dict[str, Any]:
        verdicts = [asdict(verdict) for verdict in self.verdicts()]
        shown = {"provenance": self.provenance, "options": self.options, **self.facts}
        return {**shown, "verdicts": verdicts, **self.secs}
