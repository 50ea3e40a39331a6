"""The tables, as Markdown: what a person reads on the terminal and copies into a page. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.modes.registry import REFERENCE
from bench.records import Failure
from bench.summary import RowSummary, Spread, Summary, growth_share, ratio
from bench.targets import Facts, Verdict

NOT_FLUSHED = "†"


def render(summary: Summary, facts: dict[str, Facts], failures: Sequence[Failure]) -> str:
    """Both tables, the floors and the failures."""
    parts = [
        "Medians (lowest - highest).",
        markdown(_training_header(), [_training_line(row, summary) for row in summary.rows.values()]),
        markdown(_storage_header(), [_storage_line(row, summary, facts) for row in summary.rows.values()]),
        f"{NOT_FLUSHED} its own notion of done: nothing has been flushed to the disk yet. The row with "
        "`+ fsync` waits for that.",
        _floors(summary),
    ]
    if failures:
        parts.append("Could not run:\n" + "\n".join(f"- {f.row}, {f.stage}: {f.error}" for f in failures))
    return "\n\n".join(parts)


def render_verdicts(found: Sequence[Verdict]) -> str:
    """The figures to reach, one a line."""
    lines = []
    for verdict in found:
        sign = {True: "reached", False: "MISSED", None: "not measured"}[verdict.reached]
        limit = "-" if verdict.limit is None else f"{verdict.limit:.3g} {verdict.unit}"
        value = "-" if verdict.value is None else f"{verdict.value:.3g} {verdict.unit}"
        bound = verdict.note if verdict.note == "at least" else "at most"
        note = "" if verdict.note in ("", "at least") else f" ({verdict.note})"
        lines.append([verdict.figure, value, f"{bound} {limit}{note}", sign])
    return markdown(["Holdfast", "measured", "bar", ""], lines)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose source is aligned as well: the first column left, the others right."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{c:>{w}}" for c, w in rest) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([row(header), rule, *(row(line) for line in lines)])


def _training_header() -> list[str]:
    return [
        "per save",
        "training lost, s",
        f"x {REFERENCE}",
        "steps in flight",
        "blocked, s",
        "x copy floor",
        "CPU, s",
        f"x {REFERENCE}",
    ]


def _training_line(row: RowSummary, summary: Summary) -> list[str]:
    reference = summary.rows.get(REFERENCE)
    inflation = row.inflation
    return [
        row.name,
        seconds(row.lost),
        times(ratio(row.lost, reference.lost if reference else None)),
        "-" if inflation is None else f"{100 * inflation.middle:+.0f} %",
        seconds(row.blocked, 3),
        times(ratio(row.blocked, summary.copy_floor)),
        seconds(row.cpu),
        times(ratio(row.cpu, reference.cpu if reference else None)),
    ]


def _storage_header() -> list[str]:
    return [
        "per save",
        "durable, training, s",
        "durable, idle, s",
        "x raw write",
        "host memory, GB",
        "x bytes written",
        "growth",
    ]


def _storage_line(row: RowSummary, summary: Summary, facts: dict[str, Facts]) -> list[str]:
    mark = "" if facts[row.name].durable else f" {NOT_FLUSHED}"
    memory, growth = row.memory, row.growth
    return [
        row.name + mark,
        seconds(row.stored_training) + mark,
        seconds(row.stored_idle) + mark,
        times(ratio(row.stored_idle, summary.write_floor)),
        "-" if memory is None else f"{memory.peak_bytes / 1e9:.2f}",
        "-" if memory is None else times(memory.peak_bytes / memory.rank_bytes),
        "-" if growth is None else f"{100 * growth_share(growth):+.2f} %",
    ]


def _floors(summary: Summary) -> str:
    return (
        f"Step without a save: {seconds(summary.step, 3)} s. Floors: copy {seconds(summary.copy_floor, 3)} "
        f"s, write and fsync {seconds(summary.write_floor, 3)} s ({summary.write_method}), training lost to "
        f"that write alone {seconds(summary.raw_lost)} s."
    )


def seconds(spread: Spread | None, digits: int = 2) -> str:
    """ "0.31 (0.25 - 0.40)"."""
    if spread is None:
        return "-"
    return f"{spread.middle:.{digits}f} ({spread.low:.{digits}f} - {spread.high:.{digits}f})"


def times(value: float | None) -> str:
    """A ratio, with two digits that mean something."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
