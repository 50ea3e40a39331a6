"""The result of the store benchmark: table, bars and document."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness.records import paired_ratio
from bench.harness.report import Report, Verdict, at_least, at_most, markdown, read_document, verdict_table

LEAST_OF_OBSTORE = 0.9
MOST_MEMORY_BYTES = 64 << 20
ADOPT_FROM = 1.5
"""Holdfast adopts obstore when it is this many times as fast as Holdfast's own way."""


@dataclass(slots=True)
class Figures:
    """The samples of one row. `above_bytes`: the most memory that its process took beyond its buffer."""

    name: str
    verb: str
    peer: str
    secs: list[float] = field(default_factory=list)
    above_bytes: int = 0
    failure: str = ""

    def add(self, secs: float, above_bytes: int) -> None:
        """Add a sample."""
        self.secs.append(secs)
        self.above_bytes = max(self.above_bytes, above_bytes)

    def mb_per_sec(self, shard_bytes: int) -> float:
        """Median speed."""
        return shard_bytes / 1e6 / median(self.secs)


@dataclass
class RemoteReport(Report):
    """One run. The rows of one repeat were measured one after the other, in an order of their own."""

    shard_bytes: int
    rows: list[Figures]

    def text(self) -> str:
        header = ["row", "MB/s", "slowest", "fastest", "of the best obstore", "memory, MB"]
        parts = [markdown(header, [self._line(row) for row in self.rows if row.secs and not row.failure])]
        failures = [f"- {row.name}: {row.failure}" for row in self.rows if row.failure]
        if failures:
            parts.append("\n".join(["Could not run:", *failures]))
        found = self.verdicts()
        return "\n\n".join([*parts, verdict_table(found)] if found else parts)

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "verdicts": [asdict(verdict) for verdict in self.verdicts()]}

    def best(self, peer: str, verb: str) -> Figures | None:
        """The fastest row of a peer, by its median."""
        rows = [row for row in self.rows if (row.peer, row.verb) == (peer, verb) and row.secs]
        return max(rows, key=lambda row: row.mb_per_sec(self.shard_bytes), default=None)

    def verdicts(self) -> list[Verdict]:
        """The figures against their bars, for each direction that Holdfast and obstore were measured in."""
        found = []
        for verb in ("upload", "download"):
            own, obstore = self.best("", verb), self.best("obstore", verb)
            if own is None or obstore is None:
                continue
            share = paired_ratio(obstore.secs, own.secs)
            note = f"obstore is {1 / share:.2f} x as fast, adopted from {ADOPT_FROM:g} x"
            memory, most = own.above_bytes / 1e6, MOST_MEMORY_BYTES / 1e6
            found += [
                at_least(f"{verb}: speed / obstore's", share, LEAST_OF_OBSTORE, note=note),
                at_most(f"{verb}: memory above the buffer", memory, most, "MB"),
            ]
        return found

    def _line(self, row: Figures) -> list[str]:
        speeds = [self.shard_bytes / 1e6 / secs for secs in row.secs]
        best = self.best("obstore", row.verb)
        return [
            row.name,
            f"{row.mb_per_sec(self.shard_bytes):.0f}",
            f"{min(speeds):.0f}",
            f"{max(speeds):.0f}",
            f"{paired_ratio(best.secs, row.secs):.2f} x" if best else "-",
            f"{row.above_bytes / 1e6:.0f}",
        ]


def read(path: Path) -> RemoteReport:
    """Read what `write` wrote. ValueError if the document has another version."""
    document = read_document(path)
    rows = [Figures(**row) for row in document["rows"]]
    return RemoteReport(document["provenance"], document.get("options", {}), document["shard_bytes"], rows)
