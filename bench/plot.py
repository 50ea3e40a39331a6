"""The picture: what a save costs training, and when its checkpoint is safe. It needs no text beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.modes.registry import HOLDFAST
from bench.report import Report
from bench.summary import Spread

_OURS, _OTHERS, _UNSAFE, _INK, _FAINT = "#0b7a5c", "#8b97a6", "#d7dce2", "#1d2530", "#6b7684"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: a row's figure, and whether its checkpoint is on the disk by then."""

    name: str
    spread: Spread
    safe: bool = True


def draw(report: Report, path: Path) -> None:
    """Draw two panels of bars into a .png or .svg file. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    summary = report.summary()
    lost, stored = bars(report)
    names = [bar.name for bar in lost]
    height = 1.75 + 0.4 * len(names)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12.5, height), sharey=True)
    figure.subplots_adjust(left=0.17, right=0.985, bottom=0.95 / height, top=1 - 0.85 / height, wspace=0.06)
    _panel(left, lost, names, "Training time lost per checkpoint", "seconds (less is better)")
    _panel(right, stored, names, "Checkpoint complete after", "seconds, while training goes on")
    if summary.write_floor:
        _floor_line(right, summary.write_floor.middle, "the disk alone")
    if summary.raw_lost:
        _floor_line(left, max(summary.raw_lost.middle, 0.0), "writing the bytes, nothing else")
    if any(not bar.safe for bar in stored):
        patch = Rectangle((0, 0), 1, 1, **_style(Bar("", stored[0].spread, safe=False)))
        text = "says it is done, but is not on the disk yet: a power cut loses it"
        figure.legend([patch], [text], loc="lower right", fontsize=9, frameon=False)
    figure.text(0.01, 1 - 0.2 / height, _title(report), va="top", fontsize=14, fontweight="bold", color=_INK)
    figure.text(0.01, 0.14 / height, _footer(report), fontsize=8, color=_FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    pyplot.close(figure)


def bars(report: Report) -> tuple[list[Bar], list[Bar]]:
    """The bars of both panels, least training time lost first. Pure."""
    rows = [row for row in report.summary().rows.values() if row.lost and row.stored_training]
    rows.sort(key=lambda row: row.lost.middle if row.lost else 0.0)
    return (
        [Bar(row.name, row.lost) for row in rows if row.lost],
        [
            Bar(row.name, row.stored_training, report.facts[row.name].durable)
            for row in rows
            if row.stored_training
        ],
    )


def _style(bar: Bar) -> dict[str, Any]:
    if not bar.safe:
        return {"facecolor": _UNSAFE, "hatch": "////", "edgecolor": _OTHERS, "linewidth": 0}
    return {"facecolor": _OURS if bar.name == HOLDFAST else _OTHERS}


def _panel(axes: Any, shown: Sequence[Bar], names: Sequence[str], title: str, unit: str) -> None:
    widest = max((bar.spread.high for bar in shown), default=1.0)
    for bar in shown:
        place, value = names.index(bar.name), max(bar.spread.middle, 0.0)
        axes.barh(place, value, height=0.66, **_style(bar))
        axes.hlines(place, max(bar.spread.low, 0.0), max(bar.spread.high, 0.0), color=_INK, linewidth=1.1)
        axes.text(
            max(bar.spread.high, value) + 0.012 * widest,
            place,
            f"{bar.spread.middle:.2f} s",
            va="center",
            fontsize=10,
            color=_OURS if bar.name == HOLDFAST else _INK,
            fontweight="bold" if bar.name == HOLDFAST else "normal",
        )
    axes.set_title(title, loc="left", fontsize=12, color=_INK)
    axes.set_xlabel(unit, fontsize=9, color=_FAINT)
    axes.set_xlim(0, widest * 1.16)
    axes.set_ylim(len(names) - 0.4, -1.0)
    axes.tick_params(length=0, colors=_INK)
    axes.set_yticks(range(len(names)), [_label(name) for name in names], fontsize=10.5)
    for label in axes.get_yticklabels():
        if label.get_text() == _label(HOLDFAST):
            label.set(fontweight="bold", color=_OURS)
    axes.tick_params(axis="x", labelsize=9, labelcolor=_FAINT)
    axes.grid(axis="x", color="#e8ebef", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _floor_line(axes: Any, secs: float, what: str) -> None:
    axes.axvline(secs, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0.5)
    axes.text(secs, -0.75, f"  {what}: {secs:.2f} s", fontsize=9, color=_INK, va="center")


def _label(name: str) -> str:
    return "Holdfast" if name == HOLDFAST else name


def _title(report: Report) -> str:
    state = report.state
    known = {
        "gpt2": "GPT-2",
        "gpt2-medium": "GPT-2 medium",
        "gpt2-large": "GPT-2 large",
        "gpt2-xl": "GPT-2 XL",
    }
    ranks = "one process" if state["ranks"] == 1 else f"{state['ranks']} processes"
    size = f"{state['parameters'] / 1e6:.0f} M parameters and AdamW, {state['total_bytes'] / 1e9:.2f} GB"
    return f"Saving {known.get(state['name'], 'a GPT-2')} ({size}) while it trains in {ranks}"


def _footer(report: Report) -> str:
    machine = report.provenance["machine"]
    return (
        f"Medians of {report.options['repeats']} interleaved windows in one run; lines: lowest to highest. "
        f"{machine['cores']} cores, {report.provenance['file_system']['type']}, "
        f"torch {report.provenance['versions']['torch']}, {report.provenance['date']}."
    )
