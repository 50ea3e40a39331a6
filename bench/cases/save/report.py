"""The result of the save benchmark: tables, document and picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cases.modes.registry import FLUSHED, HOLDFAST, SAVE_REFERENCE, SAVES
from bench.cases.save.bars import Facts, verdicts
from bench.cases.save.figures import RowSummary, Summary, summarise
from bench.cases.save.records import Measurements
from bench.harness import plot
from bench.harness.records import ratio
from bench.harness.report import (
    Report,
    Verdict,
    failure_list,
    markdown,
    read_document,
    seconds,
    times,
    verdict_table,
)

NOT_FLUSHED = "†"

_NAMES = {
    "gpt2": "GPT-2",
    "gpt2-medium": "GPT-2 medium",
    "gpt2-large": "GPT-2 large",
    "gpt2-xl": "GPT-2 XL",
}


@dataclass
class SaveReport(Report):
    """One run. `state` describes what was trained, `facts` the rows."""

    state: dict[str, Any]
    facts: dict[str, Facts]
    measured: Measurements

    def rows(self) -> list[str]:
        """The rows that were measured, in the order of the tables."""
        names = [name + end for name in SAVES for end in ("", FLUSHED)]
        return [name for name in names if name in self.facts]

    def summary(self) -> Summary:
        """The figures."""
        return summarise(self.measured, self.rows())

    def verdicts(self) -> list[Verdict]:
        """Holdfast's figures against their bars."""
        return verdicts(self.summary(), self.facts, cuda=self.state["cuda"])

    def text(self) -> str:
        parts = [self._heading(), tables(self.summary(), self.facts)]
        if self.measured.failures:
            parts.append(failure_list(self.measured.failures))
        found = self.verdicts()
        if found:
            parts.append(verdict_table(found))
        return "\n\n".join(parts)

    def document(self) -> dict[str, Any]:
        return {
            "provenance": self.provenance,
            "options": self.options,
            "state": self.state,
            "facts": {name: asdict(fact) for name, fact in self.facts.items()},
            "summary": asdict(self.summary()),
            "verdicts": [asdict(verdict) for verdict in self.verdicts()],
            "measured": asdict(self.measured),
        }

    def draw(self, path: Path) -> None:
        lost, stored = bars(self)
        summary, state = self.summary(), self.state
        left = plot.Panel("Training time lost per checkpoint", lost, "seconds (less is better)")
        right = plot.Panel("Checkpoint complete after", stored, "seconds, while training goes on")
        if summary.raw_lost:
            left.floors["writing the bytes, nothing else"] = max(summary.raw_lost.middle, 0.0)
        if summary.write_floor:
            right.floors["the disk alone"] = summary.write_floor.middle
        unsafe = "says it is done, but is not on the disk yet: a power cut loses it"
        ranks = "one process" if state["ranks"] == 1 else f"{state['ranks']} processes"
        size = f"{state['parameters'] / 1e6:.0f} M parameters and AdamW, {state['total_bytes'] / 1e9:.2f} GB"
        plot.draw(
            path,
            [[left, right]],
            f"Saving {_NAMES.get(state['name'], 'a GPT-2')} ({size}) while it trains in {ranks}",
            f"Medians of {self.options['repeats']} interleaved windows in one run; lines: lowest to highest. "
            f"{self.conditions()}; {self.provenance['date']}.",
            unsafe if any(bar.style == "unsafe" for bar in stored) else "",
        )

    def _heading(self) -> str:
        state = self.state
        return (
            f"{state['name']}: {state['parameters'] / 1e6:.1f} M parameters in {state['tensors']} tensors, "
            f"{state['total_bytes'] / 1e9:.2f} GB a save; {state['ranks']} rank(s) on {state['device']}, "
            f"{state['rows_per_rank']} x {state['seq_len']} tokens each; {self.conditions()}"
        )


def read(path: Path) -> SaveReport:
    """Read what `write` wrote.

    Raises:
        ValueError: the document has another version.
    """
    document = read_document(path)
    return rebuild(document["provenance"], document["options"], document)


def rebuild(provenance: dict[str, Any], options: dict[str, Any], result: dict[str, Any]) -> SaveReport:
    """A report from the JSON of its samples."""
    return SaveReport(
        provenance,
        options,
        state=result["state"],
        facts={name: Facts(**fact) for name, fact in result["facts"].items()},
        measured=Measurements.from_json(result["measured"]),
    )


def bars(report: SaveReport) -> tuple[list[plot.Bar], list[plot.Bar]]:
    """The bars of both panels, least training time lost first. Pure."""
    lost, stored = [], []
    for row in by_loss(report.summary()):
        if row.lost and row.stored_training:
            ours, safe = row.name == HOLDFAST, report.facts[row.name].durable
            name, style = ("Holdfast", "holdfast") if ours else (row.name, "peer")
            lost.append(plot.Bar(name, row.lost, style))
            stored.append(plot.Bar(name, row.stored_training, style if safe else "unsafe"))
    return lost, stored


def by_loss(summary: Summary) -> list[RowSummary]:
    """All rows, least training time lost first."""
    return sorted(summary.rows.values(), key=lambda row: row.lost.middle if row.lost else float("inf"))


def tables(summary: Summary, facts: dict[str, Facts]) -> str:
    """Both tables and the floors."""
    rows, reference = summary.rows.values(), summary.rows.get(SAVE_REFERENCE)
    reference_lost, reference_cpu = (reference.lost, reference.cpu) if reference else (None, None)

    def mark(row: RowSummary) -> str:
        return "" if facts[row.name].durable else f" {NOT_FLUSHED}"

    training: dict[str, Callable[[RowSummary], str]] = {
        "per save": lambda row: row.name,
        "training lost, s": lambda row: seconds(row.lost),
        f"x {SAVE_REFERENCE}": lambda row: times(ratio(row.lost, reference_lost)),
        "steps in flight": lambda row: f"{100 * row.inflation.middle:+.0f} %" if row.inflation else "-",
        "blocked, s": lambda row: seconds(row.blocked, 3),
        "x copy floor": lambda row: times(ratio(row.blocked, summary.copy_floor)),
        "CPU, s": lambda row: seconds(row.cpu),
        f"CPU x {SAVE_REFERENCE}": lambda row: times(ratio(row.cpu, reference_cpu)),
    }
    storage: dict[str, Callable[[RowSummary], str]] = {
        "per save": lambda row: row.name + mark(row),
        "durable, training, s": lambda row: seconds(row.stored_training) + mark(row),
        "durable, idle, s": lambda row: seconds(row.stored_idle) + mark(row),
        "x raw write": lambda row: times(ratio(row.stored_idle, summary.write_floor)),
        "host memory, GB": lambda row: f"{row.memory.peak_bytes / 1e9:.2f}" if row.memory else "-",
        "x bytes written": lambda row: times(row.memory.share if row.memory else None),
        "growth": lambda row: f"{100 * row.growth.share:+.2f} %" if row.growth else "-",
    }
    return "\n\n".join(
        [
            "Medians (lowest - highest).",
            *(
                markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows])
                for columns in (training, storage)
            ),
            f"{NOT_FLUSHED} as the row itself calls it done: nothing has been flushed to the disk. The row "
            "with `+ fsync` waits for that.",
            f"Step without a save: {seconds(summary.step, 3)} s. Floors: copy "
            f"{seconds(summary.copy_floor, 3)} s, write and fsync {seconds(summary.write_floor, 3)} s "
            f"({summary.write_method}), training lost to that write alone {seconds(summary.raw_lost)} s.",
        ]
    )
