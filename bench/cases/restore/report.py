"""The result of the restore benchmark: tables, document and picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cases.modes.registry import HOLDFAST, LOAD_REFERENCE
from bench.cases.restore.records import CACHES, FLOORS, Measured, verdicts
from bench.harness import plot
from bench.harness.report import Report, failure_list, markdown, read_document, seconds, times, verdict_table


@dataclass
class RestoreReport(Report):
    """One run: every case."""

    cases: list[Measured]

    def text(self) -> str:
        return "\n\n".join([self._heading(), "Medians (lowest - highest).", *map(_case_text, self.cases)])

    def document(self) -> dict[str, Any]:
        return {
            "provenance": self.provenance,
            "options": self.options,
            "verdicts": {case.case.name: [asdict(one) for one in verdicts(case)] for case in self.cases},
            "cases": [asdict(case) for case in self.cases],
        }

    def draw(self, path: Path) -> None:
        grid = [[_panel(case, cache) for cache in CACHES] for case in self.cases]
        footer = (
            f"Medians of {self.options['repeats']} interleaved repeats in one run; lines: lowest to highest. "
            f"{self.conditions()}; {self.provenance['date']}."
        )
        plot.draw(path, grid, f"Restoring {self.options['state']} and AdamW in place", footer)

    def _heading(self) -> str:
        return f"{self.options['state']}, restored in place; {self.conditions()}"


def read(path: Path) -> RestoreReport:
    """Read what `write` wrote. ValueError if the document has another version."""
    document = read_document(path)
    cases = [Measured.from_json(case) for case in document["cases"]]
    return RestoreReport(document["provenance"], document["options"], cases)


def bars(measured: Measured, cache: str) -> list[plot.Bar]:
    """The bars of one panel, fastest first. Pure."""
    found = []
    for row in measured.rows():
        spread = measured.secs(row, cache)
        if spread:
            ours = row == HOLDFAST
            style = "holdfast" if ours else "floor" if row in FLOORS else "peer"
            found.append(plot.Bar("Holdfast, verified" if ours else row, spread, style))
    return sorted(found, key=lambda bar: bar.spread.middle)


def _panel(measured: Measured, cache: str) -> plot.Panel:
    where = "from the disk" if cache == "cold" else "from the page cache"
    return plot.Panel(f"{measured.case.name} rank(s), {where}", bars(measured, cache))


def _case_text(measured: Measured) -> str:
    title = (
        f"Saved by {measured.case.saved} rank(s), restored by {measured.case.restored} on {measured.device}: "
        f"{measured.needed_bytes / 1e9:.2f} GB of tensors"
    )
    header = ["restore"]
    for cache in CACHES:
        header += [f"{cache}, s", "x one thread", "x better read", f"x {LOAD_REFERENCE}"]
    header += ["from disk / needed", "asked / needed", "host memory, MB"]
    parts = [title, markdown(header, [_line(measured, row) for row in measured.rows()])]
    if measured.failures:
        parts.append(failure_list(measured.failures))
    found = verdicts(measured)
    return "\n\n".join([*parts, verdict_table(found)] if found else parts)


def _line(measured: Measured, row: str) -> list[str]:
    cells = [row]
    for cache in CACHES:
        cells += [seconds(measured.secs(row, cache), 3), *map(times, measured.ratios(row, cache))]
    memory = measured.memory.get(row)
    return [
        *cells,
        times(measured.disk_share(row)),
        times(measured.read_share(row)),
        "-" if memory is None else f"{memory / 1e6:.0f}",
    ]
