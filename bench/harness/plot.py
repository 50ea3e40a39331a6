"""Pictures: panels of bars, one bar a row, with the range of its samples and floors as dashed lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.records import Spread

_OURS, _INK, _FAINT = "#0b7a5c", "#1d2530", "#6b7684"

STYLES: dict[str, dict[str, Any]] = {
    "holdfast": {"facecolor": _OURS},
    "peer": {"facecolor": "#8b97a6"},
    "floor": {"facecolor": "#d7dce2"},
    "unsafe": {"facecolor": "#d7dce2", "hatch": "////", "edgecolor": "#8b97a6", "linewidth": 0},
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One row's seconds, in one of the styles above."""

    name: str
    spread: Spread
    style: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars from top to bottom. `floors`: seconds by what they are."""

    title: str
    bars: Sequence[Bar]
    unit: str = "seconds"
    floors: dict[str, float] = field(default_factory=dict)


def draw(path: Path, grid: Sequence[Sequence[Panel]], title: str, footer: str, unsafe: str = "") -> None:
    """Draw rows of panels into a .png or .svg file. `unsafe`: the legend of that style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    tallest = max(len(panel.bars) for line in grid for panel in line)
    height = 0.8 + len(grid) * (1.1 + 0.4 * tallest)
    figure, axes = pyplot.subplots(
        len(grid), len(grid[0]), figsize=(12.5, height), squeeze=False, layout="constrained"
    )
    for axes_line, line in zip(axes, grid, strict=True):
        for one, panel in zip(axes_line, line, strict=True):
            _draw_panel(one, panel)
    if unsafe:
        patch = Rectangle((0, 0), 1, 1, **STYLES["unsafe"])
        figure.legend([patch], [unsafe], loc="outside lower right", fontsize=9, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=_INK)
    figure.supxlabel(footer, x=0.01, ha="left", fontsize=8, color=_FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")
    pyplot.close(figure)


def _draw_panel(axes: Any, panel: Panel) -> None:
    widest = max((bar.spread.high for bar in panel.bars), default=1.0)
    for place, bar in enumerate(panel.bars):
        value, high = max(bar.spread.middle, 0.0), max(bar.spread.high, 0.0)
        look = {"color": _OURS, "fontweight": "bold"} if bar.style == "holdfast" else {"color": _INK}
        axes.barh(place, value, height=0.66, **STYLES[bar.style])
        axes.hlines(place, max(bar.spread.low, 0.0), high, color=_INK, linewidth=1.1)
        text = f"{bar.spread.middle:.2f} s"
        axes.text(max(high, value) + 0.012 * widest, place, text, va="center", fontsize=10, **look)
    for what, secs in panel.floors.items():
        axes.axvline(secs, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0.5)
        axes.text(secs, -0.75, f"  {what}: {secs:.2f} s", fontsize=9, color=_INK, va="center")
    axes.set_title(panel.title, loc="left", fontsize=12, color=_INK)
    axes.set_xlabel(panel.unit, fontsize=9, color=_FAINT)
    axes.set_xlim(0, widest * 1.16)
    axes.set_ylim(len(panel.bars) - 0.4, -1.0)
    axes.set_yticks(range(len(panel.bars)), [bar.name for bar in panel.bars], fontsize=10)
    axes.tick_params(length=0, colors=_INK)
    axes.tick_params(axis="x", labelsize=9, labelcolor=_FAINT)
    for label, bar in zip(axes.get_yticklabels(), panel.bars, strict=True):
        if bar.style == "holdfast":
            label.set(fontweight="bold", color=_OURS)
    axes.grid(axis="x", color="#e8ebef", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
