"""The picture: seconds of a restore, cold and warm, for every case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.restoring.records import CACHES, FLOORS, Measured
from bench.restoring.registry import HOLDFAST
from bench.restoring.report import Report
from bench.summary import Spread

_OURS, _OTHERS, _FLOOR, _INK = "#0b7a5c", "#8b97a6", "#d7dce2", "#1d2530"


def draw(report: Report, path: Path) -> None:
    """Draw a row of two panels for each case into a .png or .svg file. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tallest = max(len(case.rows()) for case in report.cases)
    height = len(report.cases) * (1.1 + 0.36 * tallest) + 0.7
    figure, grid = pyplot.subplots(
        len(report.cases), 2, figsize=(12.5, height), squeeze=False, layout="constrained"
    )
    for line, case in zip(grid, report.cases, strict=True):
        for axes, cache in zip(line, CACHES, strict=True):
            _panel(axes, case, cache)
    figure.suptitle("Restoring a checkpoint in place\n" + report.heading(), fontsize=10, color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    pyplot.close(figure)


def bars(measured: Measured, cache: str) -> list[tuple[str, Spread]]:
    """The bars of one panel, fastest first. Pure."""
    found = [(row, spread) for row in measured.rows() if (spread := measured.secs(row, cache))]
    return sorted(found, key=lambda bar: bar[1].middle)


def _panel(axes: Any, measured: Measured, cache: str) -> None:
    shown = bars(measured, cache)
    widest = max((spread.high for _, spread in shown), default=1.0)
    for place, (row, spread) in enumerate(shown):
        color = _OURS if row == HOLDFAST else _FLOOR if row in FLOORS else _OTHERS
        axes.barh(place, spread.middle, height=0.66, color=color)
        axes.hlines(place, spread.low, spread.high, color=_INK, linewidth=1.1)
        axes.text(spread.high + 0.012 * widest, place, f"{spread.middle:.2f} s", va="center", fontsize=9)
    axes.set_yticks(
        range(len(shown)), ["Holdfast, verified" if row == HOLDFAST else row for row, _ in shown], fontsize=9
    )
    axes.set_xlim(0, widest * 1.16)
    axes.invert_yaxis()
    ranks = f"{measured.case.saved} -> {measured.case.restored} rank(s)"
    where = "from the disk" if cache == "cold" else "from the page cache"
    axes.set_title(f"{ranks}, {where}, seconds", loc="left", fontsize=10, color=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=9)
