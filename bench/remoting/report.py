"""What was measured, as a table, as verdicts and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.document import read_document, write_document

VERSION = 1

LEAST_OF_OBSTORE = 0.9
MOST_MEMORY_BYTES = 64 << 20
ADOPT_FROM = 1.5
"""obstore becomes a way of Holdfast's own where it is so many times as fast as the fsspec way."""


@dataclass(slots=True)
class Figures:
    """The samples of one row."""

    name: str
    verb: str
    peer: str
    secs: list[float] = field(default_factory=list)
    above_bytes: int = 0
    """Most memory that the process took beyond its buffer."""
    failure: str = ""

    def mb_per_sec(self, shard_bytes: int) -> float:
        """Median speed."""
        return shard_bytes / 1e6 / median(self.secs)


@dataclass(slots=True)
class Report:
    """One run. Rows of one repeat were measured one after the other, in an order of their own."""

    provenance: dict[str, Any]
    shard_bytes: int
    rows: list[Figures]

    def text(self) -> str:
        """Table and verdicts."""
        lines = [
            f"{'':36} {'MB/s':>7} {'slowest':>8} {'fastest':>8} {'of the best obstore':>20} {'memory':>9}"
        ]
        for row in self.rows:
            if row.failure or not row.secs:
                lines.append(f"{row.name:36} {row.failure or 'not measured'}")
                continue
            speeds = [self.shard_bytes / 1e6 / secs for secs in row.secs]
            best = self.best("obstore", row.verb)
            share = f"{self.against(row, best):.2f} x" if best else "-"
            lines.append(
                f"{row.name:36} {row.mb_per_sec(self.shard_bytes):7.0f} {min(speeds):8.0f} "
                f"{max(speeds):8.0f} {share:>20} {row.above_bytes / 1e6:6.0f} MB"
            )
        return "\n".join([*lines, "", *self.verdicts()])

    def best(self, peer: str, verb: str) -> Figures | None:
        """The fastest row of a peer, by its median."""
        rows = [row for row in self.rows if (row.peer, row.verb) == (peer, verb) and row.secs]
        return max(rows, key=lambda row: row.mb_per_sec(self.shard_bytes), default=None)

    def against(self, row: Figures, other: Figures) -> float:
        """How many times as fast: the median over the repeats, since both share each repeat's conditions."""
        return median(theirs / own for own, theirs in zip(row.secs, other.secs, strict=False))

    def verdicts(self) -> list[str]:
        """Each bar with its figure."""
        said = []
        for verb in ("upload", "download"):
            own, obstore = self.best("", verb), self.best("obstore", verb)
            if own is None or obstore is None:
                continue
            share = self.against(own, obstore)
            said.append(
                f"{_mark(share >= LEAST_OF_OBSTORE)} {verb}: {share:.2f} x of obstore's own, at least "
                f"{LEAST_OF_OBSTORE}; obstore is {1 / share:.2f} x as fast as the fsspec way, adopted from "
                f"{ADOPT_FROM}"
            )
            said.append(
                f"{_mark(own.above_bytes <= MOST_MEMORY_BYTES)} {verb}: {own.above_bytes / 1e6:.0f} MB of "
                f"memory above the buffer, at most {MOST_MEMORY_BYTES / 1e6:.0f}"
            )
        return said

    def write(self, path: Path) -> None:
        """Write it as JSON, every sample included."""
        write_document(path, VERSION, {**asdict(self), "verdicts": self.verdicts()})


def read(path: Path) -> Report:
    """Read what `write` wrote. ValueError for another version of the document."""
    document = read_document(path, VERSION)
    rows = [Figures(**row) for row in document["rows"]]
    return Report(document["provenance"], document["shard_bytes"], rows)


def _mark(holds: bool) -> str:
    return "holds " if holds else "MISSED"
