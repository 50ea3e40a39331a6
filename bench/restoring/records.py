"""What was measured, and its figures and bars. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.records import Failure
from bench.restoring.registry import HOLDFAST, REFERENCE
from bench.summary import Spread, ratio
from bench.targets import Verdict

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
    """One restore by a row, or one pass of a floor.

    Attributes:
        cache: "cold" (its files were dropped from the page cache before) or "warm" (read before).
        secs: of the slowest rank.
        disk_bytes: that all ranks had read from the disk.
        read_bytes: that all ranks asked for, where a row says so (Holdfast); else None.
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

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Measured:
        """Rebuild what `to_json` returned."""
        return cls(
            Case(**document["case"]),
            document["device"],
            document["needed_bytes"],
            [Load(**load) for load in document["loads"]],
            document["memory"],
            [Failure(**failure) for failure in document["failures"]],
        )

    def rows(self) -> list[str]:
        """Everything that was timed, floors last, in the order of the tables."""
        seen = list(dict.fromkeys(load.row for load in self.loads))
        return sorted(seen, key=lambda row: row in FLOORS)

    def secs(self, row: str, cache: str) -> Spread | None:
        """Seconds of a row."""
        return Spread.of(load.secs for load in self.loads if (load.row, load.cache) == (row, cache))

    def best_floor(self, cache: str) -> Spread | None:
        """The faster one of the raw reads."""
        found = [spread for name in FLOORS if (spread := self.secs(name, cache))]
        return min(found, key=lambda spread: spread.middle, default=None)

    def disk_share(self, row: str) -> float | None:
        """Bytes read from the disk when cold, as a share of the bytes needed."""
        spread = Spread.of(load.disk_bytes for load in self.loads if (load.row, load.cache) == (row, "cold"))
        return spread.middle / self.needed_bytes if spread else None

    def read_share(self, row: str) -> float | None:
        """Bytes that a row asked for, as a share of the bytes needed; None where it does not say."""
        spread = Spread.of(load.read_bytes for load in self.loads if load.row == row and load.read_bytes)
        return spread.middle / self.needed_bytes if spread else None


def order_of(rows: Sequence[str], repeat: int, seed: int) -> list[tuple[str, str]]:
    """(row, cache) of one repeat, shuffled by (seed, repeat): drift of the machine hits all alike."""
    items = [(row, cache) for row in (*rows, *FLOORS) for cache in CACHES]
    random.Random(f"{seed}/{repeat}").shuffle(items)
    return items


def verdicts(measured: Measured) -> list[Verdict]:
    """Holdfast's figures against their bars; an empty list when it was not measured."""
    if HOLDFAST not in measured.rows():
        return []
    found = []
    for cache in CACHES:
        ours = measured.secs(HOLDFAST, cache)
        one, best = measured.secs(FLOORS[0], cache), measured.best_floor(cache)
        reference = measured.secs(REFERENCE, cache)
        found += [
            _at_most(f"{cache}: / raw read, one thread", ratio(ours, one), MOST_OF_ONE_THREAD, "x"),
            _at_most(f"{cache}: / better raw read", ratio(ours, best), MOST_OF_BEST_READ, "x"),
            _at_most(f"{cache}: / {REFERENCE}", ratio(ours, reference), MOST_OF_REFERENCE, "x"),
        ]
    memory = measured.memory.get(HOLDFAST)
    taken = None if memory is None else memory / 1e6
    return [
        *found,
        _at_most("host memory above the tensors, a rank", taken, MOST_MEMORY_BYTES / 1e6, "MB"),
        _at_most("bytes read / needed", measured.read_share(HOLDFAST), MOST_READ, "x"),
    ]


def _at_most(figure: str, value: float | None, limit: float, unit: str) -> Verdict:
    return Verdict(figure, value, limit, unit, None if value is None else value <= limit)
