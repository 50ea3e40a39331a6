"""What the small benchmarks have in common: flags, numbers in them, and the word for a figure and its bar."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_common_flags(parser: argparse.ArgumentParser, *, dir_help: str = "where to save") -> None:
    """`--seed`, `--dir` and `--json`, which mean the same in each."""
    parser.add_argument("--seed", type=int, default=1, help="of the order")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/bench"), help=f"{dir_help} (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured here")


def at_least(least: int) -> Callable[[str], int]:
    """For a flag's `type`: a whole number, no less than that."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} given, but it must be at least {least}")
        return value

    return parse


def verdict(value: float, limit: float) -> str:
    """Whether the figure is at most its limit."""
    return "reached" if value <= limit else "MISSED"
