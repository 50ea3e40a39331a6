"""One run as a document: every case with its provenance, written, read back, and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.document import read_document, write_document
from bench.restoring.records import CACHES, FLOORS, Measured, verdicts
from bench.restoring.registry import REFERENCE
from bench.summary import ratio
from bench.table import markdown, render_verdicts, seconds, times

VERSION = 1


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a run leaves behind."""

    provenance: dict[str, Any]
    options: dict[str, Any]
    cases: list[Measured]

    def text(self) -> str:
        """What is printed."""
        return "\n\n".join([self.heading(), "Medians (lowest - highest).", *map(_case_text, self.cases)])

    def heading(self) -> str:
        """What was measured where, in a line."""
        git, machine = self.provenance["git"], self.provenance["machine"]
        revision = (git["revision"] or "no repository")[:12] + (" with changes" if git["dirty"] else "")
        return (
            f"{self.options['state']}, restored in place; {machine['cores']} cores, "
            f"{self.provenance['file_system']['type']}; torch {self.provenance['versions']['torch']}; "
            f"{revision}"
        )

    def write(self, path: Path) -> None:
        """Write it as JSON: provenance and figures first, every single measurement in the cases."""
        document = {
            "provenance": self.provenance,
            "options": self.options,
            "verdicts": {case.case.name: [asdict(one) for one in verdicts(case)] for case in self.cases},
            "cases": [case.to_json() for case in self.cases],
        }
        write_document(path, VERSION, document)


def read(path: Path) -> Report:
    """Read what `write` wrote. ValueError for another version of the document."""
    document = read_document(path, VERSION)
    return Report(document["provenance"], document["options"], [*map(Measured.from_json, document["cases"])])


def _case_text(measured: Measured) -> str:
    title = (
        f"Saved by {measured.case.saved} rank(s), restored by {measured.case.restored} on {measured.device}: "
        f"{measured.needed_bytes / 1e9:.2f} GB of tensors"
    )
    header = ["restore"]
    for cache in CACHES:
        header += [f"{cache}, s", "x one thread", "x better read", f"x {REFERENCE}"]
    header += ["from disk / needed", "asked / needed", "host memory, MB"]
    parts = [title, markdown(header, [_line(measured, row) for row in measured.rows()])]
    if measured.failures:
        parts.append(
            "Could not run:\n" + "\n".join(f"- {f.row}, {f.stage}: {f.error}" for f in measured.failures)
        )
    found = verdicts(measured)
    return "\n\n".join([*parts, render_verdicts(found)] if found else parts)


def _line(measured: Measured, row: str) -> list[str]:
    cells = [row]
    for cache in CACHES:
        secs = measured.secs(row, cache)
        wholes = (
            measured.secs(FLOORS[0], cache),
            measured.best_floor(cache),
            measured.secs(REFERENCE, cache),
        )
        cells += [seconds(secs, 3), *(times(ratio(secs, whole)) for whole in wholes)]
    memory = measured.memory.get(row)
    return [
        *cells,
        times(measured.disk_share(row)),
        times(measured.read_share(row)),
        "-" if memory is None else f"{memory / 1e6:.0f}",
    ]
