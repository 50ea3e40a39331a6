"""One run as a document: measurements with their provenance, written, read back, and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.document import read_document, write_document
from bench.modes.registry import FLUSHED, MODES
from bench.records import Measurements
from bench.summary import Summary, summarise
from bench.table import render, render_verdicts
from bench.targets import Facts, Verdict, verdicts

VERSION = 1


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a run leaves behind. `state` describes what was trained, `provenance` where."""

    provenance: dict[str, Any]
    options: dict[str, Any]
    state: dict[str, Any]
    facts: dict[str, Facts]
    measured: Measurements

    @property
    def cuda(self) -> bool:
        """Whether it ran on a CUDA device."""
        return bool(self.state["cuda"])

    def rows(self) -> list[str]:
        """Rows that were measured, in the order of the tables."""
        names = [name + end for name in MODES for end in ("", FLUSHED)]
        return [name for name in names if name in self.facts]

    def summary(self) -> Summary:
        """The figures."""
        return summarise(self.measured, self.rows())

    def verdicts(self) -> list[Verdict]:
        """Holdfast's figures against their bars."""
        return verdicts(self.summary(), self.facts, cuda=self.cuda)

    def text(self) -> str:
        """What is printed."""
        parts = [self._heading(), render(self.summary(), self.facts, self.measured.failures)]
        found = self.verdicts()
        if found:
            parts.append(render_verdicts(found))
        return "\n\n".join(parts)

    def write(self, path: Path) -> None:
        """Write it as JSON: provenance and figures first, every single measurement after them."""
        document = {
            "provenance": self.provenance,
            "options": self.options,
            "state": self.state,
            "facts": {name: asdict(fact) for name, fact in self.facts.items()},
            "summary": asdict(self.summary()),
            "verdicts": [asdict(verdict) for verdict in self.verdicts()],
            "measured": self.measured.to_json(),
        }
        write_document(path, VERSION, document)

    def _heading(self) -> str:
        state, git = self.state, self.provenance["git"]
        revision = (git["revision"] or "no repository")[:12] + (" with changes" if git["dirty"] else "")
        machine = self.provenance["machine"]
        return (
            f"{state['name']}: {state['parameters'] / 1e6:.1f} M parameters in {state['tensors']} tensors, "
            f"{state['total_bytes'] / 1e9:.2f} GB a save; {state['ranks']} rank(s) on {state['device']}, "
            f"{state['rows_per_rank']} x {state['seq_len']} tokens each; {machine['cores']} cores, "
            f"{self.provenance['file_system']['type']}; torch {self.provenance['versions']['torch']}; "
            f"{revision}"
        )


def read(path: Path) -> Report:
    """Read what `write` wrote.

    Raises:
        ValueError: another version of the document.
    """
    document = read_document(path, VERSION)
    return Report(
        provenance=document["provenance"],
        options=document["options"],
        state=document["state"],
        facts={name: Facts(**fact) for name, fact in document["facts"].items()},
        measured=Measurements.from_json(document["measured"]),
    )
