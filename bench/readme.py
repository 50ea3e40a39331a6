"""`python -m bench.readme`: writes the figures of a committed result into the project's README.

Nobody types a figure: the part between two marks is generated, and a test compares it with the result.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.cases.modes.registry import HOLDFAST, SAVE_REFERENCE
from bench.cases.save.report import NOT_FLUSHED, SaveReport, by_loss, read
from bench.harness.launch import ROOT
from bench.harness.records import Spread, ratio
from bench.harness.report import markdown, times

README = ROOT / "README.md"
RESULT = Path("bench/results/gpt2-1-rank.json")
BEGIN = "<!-- from bench/results by python -m bench.readme -->"
END = "<!-- end -->"


def section(report: SaveReport, result: Path) -> str:
    """The picture, the table, and where they come from."""
    summary = report.summary()
    reference = summary.rows.get(SAVE_REFERENCE)
    lines = [
        [
            f"**{row.name}**" if row.name == HOLDFAST else row.name,
            _middle(row.lost),
            times(ratio(row.lost, reference.lost if reference else None)),
            _middle(row.blocked, 3),
            _middle(row.stored_training) + ("" if report.facts[row.name].durable else f" {NOT_FLUSHED}"),
            _middle(row.cpu),
        ]
        for row in by_loss(summary)
    ]
    header = ["s per save", "training lost", f"x {SAVE_REFERENCE}", "blocked", "complete after", "CPU"]
    state, provenance = report.state, report.provenance
    floors = f"copy {_middle(summary.copy_floor, 3)} s, raw write and fsync {_middle(summary.write_floor)} s"
    if summary.raw_lost:
        floors += f", training lost to that write alone {_middle(summary.raw_lost)} s"
    machine, torch = provenance["machine"], provenance["versions"]["torch"]
    where = f"{state['ranks']} rank(s) on {machine['cores']} CPU cores, torch {torch}"
    revision = provenance["git"]["revision"][:12]
    missed = [verdict.figure for verdict in report.verdicts() if verdict.reached is False]
    return "\n".join(
        [
            f"![Training time lost per checkpoint, and when it is complete]({result.with_suffix('.png')})",
            "",
            f"{state['name']} and AdamW, {state['total_bytes'] / 1e9:.2f} GB a save, {where}; medians of one "
            f"interleaved run at revision {revision}; floors: {floors}. {NOT_FLUSHED} marks modes that "
            "report completion before anything is flushed.",
            "",
            markdown(header, lines),
            "",
            f"Holdfast's own bars missed in this run: {'; '.join(missed) or 'none'}. "
            f"[{result}]({result}) has every sample; [bench/README.md](bench/README.md) the method.",
        ]
    )


def embed(page: str, text: str) -> str:
    """The page with everything between the marks replaced.

    Raises:
        ValueError: the page lacks a mark.
    """
    before, begun, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"the page lacks {BEGIN if not begun else END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    """Rewrite the README; returns the exit status."""
    page = README.read_text(encoding="utf-8")
    README.write_text(embed(page, section(read(ROOT / RESULT), RESULT)), encoding="utf-8")
    return 0


def _middle(spread: Spread | None, digits: int = 2) -> str:
    return "-" if spread is None else f"{spread.middle:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
