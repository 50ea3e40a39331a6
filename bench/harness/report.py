"""A result: its JSON document, its tables as Markdown, and its figures against their bars."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.launch import RanksFailed
from bench.harness.records import Failure, Spread

VERSION = 1
"""Of every document."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One figure against its bar. `reached` is None where the figure or the bar could not be measured."""

    figure: str
    value: float | None
    limit: float | None
    unit: str
    reached: bool | None
    note: str = ""
    bound: str = "at most"


def at_most(
    figure: str, value: float | None, limit: float | None, unit: str = "x", note: str = ""
) -> Verdict:
    """A figure whose bar is an upper limit."""
    reached = None if value is None or limit is None else value <= limit
    return Verdict(figure, value, limit, unit, reached, note)


def at_least(figure: str, value: float | None, limit: float, unit: str = "x", note: str = "") -> Verdict:
    """A figure whose bar is a lower limit."""
    return Verdict(figure, value, limit, unit, None if value is None else value >= limit, note, "at least")


@dataclass
class Report:
    """What a run leaves behind; each benchmark adds its samples. `options`: as given, without paths."""

    provenance: dict[str, Any]
    options: dict[str, Any]

    def text(self) -> str:
        """What is printed."""
        raise NotImplementedError

    def document(self) -> dict[str, Any]:
        """What `--json` writes beside the version: figures and verdicts for people, samples for `--load`."""
        raise NotImplementedError

    def draw(self, path: Path) -> None:
        """Draw the picture. ImportError without matplotlib."""
        raise NotImplementedError

    def write(self, path: Path) -> None:
        """Write the document; its folder is created if necessary."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, **self.document()}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")

    def conditions(self) -> str:
        """Where it was measured, in half a line."""
        git, machine = self.provenance["git"], self.provenance["machine"]
        revision = (git["revision"] or "no repository")[:12] + (" with changes" if git["dirty"] else "")
        return (
            f"{machine['cores']} cores, {self.provenance['file_system']['type']}; "
            f"torch {self.provenance['versions']['torch']}; {revision}"
        )


def read_document(path: Path) -> dict[str, Any]:
    """Read what `Report.write` wrote.

    Raises:
        ValueError: the document has another version.
    """
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if document.get("version") != VERSION:
        raise ValueError(f"{path} has version {document.get('version')} of this document, not {VERSION}")
    return document


def finish(
    options: argparse.Namespace, measure: Callable[[], Report], read: Callable[[Path], Report] | None = None
) -> int:
    """Measure, or read an earlier result; then write, print and draw it. Returns the exit status.

    It is 0 whatever the figures, and 1 when the ranks failed.
    """
    try:
        report = read(options.load) if read and options.load else measure()
    except RanksFailed:
        return 1
    if options.json is not None:
        report.write(options.json)
    print(report.text(), flush=True)
    if getattr(options, "plot", None) is not None:
        report.draw(options.plot)
    return 0


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose source is aligned, too: the first column left, the others right."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{c:>{w}}" for c, w in rest) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([row(header), rule, *(row(line) for line in lines)])


def verdict_table(found: Sequence[Verdict]) -> str:
    """The figures and their bars, one a line."""
    lines = []
    for verdict in found:
        outcome = {True: "reached", False: "MISSED", None: "not measured"}[verdict.reached]
        value = "-" if verdict.value is None else f"{verdict.value:.3g} {verdict.unit}"
        limit = "-" if verdict.limit is None else f"{verdict.limit:.3g} {verdict.unit}"
        note = f" ({verdict.note})" if verdict.note else ""
        lines.append([verdict.figure, value, f"{verdict.bound} {limit}{note}", outcome])
    return markdown(["Holdfast", "measured", "bar", ""], lines)


def failure_list(failures: Sequence[Failure]) -> str:
    """What could not run, and why."""
    return "Could not run:\n" + "\n".join(f"- {f.row}, {f.stage}: {f.error}" for f in failures)


def seconds(spread: Spread | None, digits: int = 2) -> str:
    """ "0.31 (0.25 - 0.40)"."""
    if spread is None:
        return "-"
    return f"{spread.middle:.{digits}f} ({spread.low:.{digits}f} - {spread.high:.{digits}f})"


def times(value: float | None) -> str:
    """A ratio, to two significant digits or so."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
