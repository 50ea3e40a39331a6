"""What the restore benchmark measures, its figures and its bars. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.cases.modes.registry import HOLDFAST, LOAD_REFERENCE
from bench.harness.records import Failure, Spread, ratio
from bench.harness.report import Verdict, at_most

FLOORS = ("raw read, 1 thread", "raw read, 2 threads")
CACHES = ("cold", "warm")

MOST_OF_ONE_THREAD = 0.9
MOST_OF_BEST_READ = 1.2
MOST_OF_REFERENCE = 0.6
MOST_MEMORY_BYTES = 256_000_000
MOST_READ = 1.05


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint of `saved` ranks, restored by `restored`."""

    saved: int
    restored: int

    @property
    def name(self) -> str:
        """ "2 -> 4"."""
        return f"{self.saved} -> {self.restored}"


@dataclass(frozen=True, slots=True)
class Load:
    """One restore of a row, or one pass of a floor.

    Attributes:
        cache: "cold" (its files were dropped from the page cache before) or "warm" (read before).
        secs: of the slowest rank.
        disk_bytes: what all ranks read from the disk.
        read_bytes: what all ranks asked for, if the row reports it (Holdfast); else None.
    """

    row: str
    cache: str
    repeat: int
    secs: float
    disk_bytes: int
    read_bytes: int | None = None


@dataclass(slots=True)
class Measured:
    """One case. `needed_bytes`: of the tensors that all ranks fill; `memory`: bytes above them, by row."""

    case: Case
    device: str
    needed_bytes: int
    loads: list[Load] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Measured:
        """Rebuild what `dataclasses.asdict` and JSON made of it."""
        return cls(
            **{
                **document,
                "case": Case(**document["case"]),
                "loads": [Load(**load) for load in document["loads"]],
                "failures": [Failure(**failure) for failure in document["failures"]],
            }
        )

    def rows(self) -> list[str]:
        """Everything that was timed, in the order of the tables: floors last."""
        seen = list(dict.fromkeys(load.row for load in self.loads))
        return sorted(seen, key=lambda row: row in FLOORS)

    def secs(self, row: str, cache: str) -> Spread | None:
        """Seconds of a row."""
        return Spread.of(load.secs for load in self.loads if (load.row, load.cache) == (row, cache))

    def best_floor(self, cache: str) -> Spread | None:
        """The faster raw read."""
        found = [spread for name in FLOORS if (spread := self.secs(name, cache))]
        return min(found, key=lambda spread: spread.middle, default=None)

    def ratios(self, row: str, cache: str) -> list[float | None]:
        """A row's seconds over those of the raw read by one thread, the better raw read and the reference."""
        wholes = (self.secs(FLOORS[0], cache), self.best_floor(cache), self.secs(LOAD_REFERENCE, cache))
        return [ratio(self.secs(row, cache), whole) for whole in wholes]

    def disk_share(self, row: str) -> float | None:
        """Bytes read from the disk when cold, as a share of the bytes needed."""
        spread = Spread.of(load.disk_bytes for load in self.loads if (load.row, load.cache) == (row, "cold"))
        return spread.middle / self.needed_bytes if spread else None

    def read_share(self, row: str) -> float | None:
        """Bytes that a row asked for, as a share of the bytes needed; None if it does not say."""
        spread = Spread.of(load.read_bytes for load in self.loads if load.row == row and load.read_bytes)
        return spread.middle / self.needed_bytes if spread else None


def items_of(rows: Sequence[str]) -> list[tuple[str, str]]:
    """(row, cache) of everything that one repeat measures."""
    return [(row, cache) for row in (*rows, *FLOORS) for cache in CACHES]


def verdicts(measured: Measured) -> list[Verdict]:
    """Holdfast's figures against their bars; an empty list when Holdfast was not measured."""
    if HOLDFAST not in measured.rows():
        return []
    found = []
    for cache in CACHES:
        one_thread, best_read, reference = measured.ratios(HOLDFAST, cache)
        found += [
            at_most(f"{cache}: / raw read, one thread", one_thread, MOST_OF_ONE_THREAD),
            at_most(f"{cache}: / better raw read", best_read, MOST_OF_BEST_READ),
            at_most(f"{cache}: / {LOAD_REFERENCE}", reference, MOST_OF_REFERENCE),
        ]
    memory = measured.memory.get(HOLDFAST)
    taken = None if memory is None else memory / 1e6
    return [
        *found,
        at_most("host memory above the tensors, a rank", taken, MOST_MEMORY_BYTES / 1e6, "MB"),
        at_most("bytes read / needed", measured.read_share(HOLDFAST), MOST_READ),
    ]
