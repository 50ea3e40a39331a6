"""Command lines: flags that mean the same in every benchmark, and types that refuse senseless values."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.harness.sizes import parse_state


def base_parser(prog: str, description: str, *, repeats: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--repeats", type=at_least(1), default=repeats, help="samples of everything (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order and of all random values")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    return parser


def add_dir_flag(parser: argparse.ArgumentParser) -> None:
    """`--dir`, for a benchmark that writes to a disk."""
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("runs/bench"),
        help="a directory on the disk to measure (default: %(default)s); the benchmark works in a temporary "
        "folder in it",
    )


def add_load_flag(parser: Any) -> None:
    """`--load`, for a benchmark whose results can be shown again."""
    parser.add_argument(
        "--load", type=Path, metavar="JSON", help="measure nothing: show the result of an earlier --json"
    )


def add_model_flags(parser: argparse.ArgumentParser, rows_flag: str, rows: Sequence[str], *also: str) -> None:
    """The flags of a benchmark that compares `rows` on a GPT-2. `also`: names that add nothing."""
    parser.add_argument(
        "--state",
        type=state,
        default="gpt2",
        help="gpt2, gpt2-medium or another preset, parameters (20M), or bytes of model and optimizer (250MB)",
    )
    parser.add_argument(
        rows_flag,
        nargs="+",
        choices=(*rows, *also),
        default=list(rows),
        metavar="NAME",
        help=f"of: {', '.join(rows)} (all)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the state is"
    )
    parser.add_argument("--plot", type=picture, help="draw the result into this .png or .svg file")
    add_dir_flag(parser)
    add_load_flag(parser)


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} given, but it must be at least {least}")
        return value

    return parse


def above_zero(text: str) -> float:
    """An argparse type: a positive number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value:g} given, but it must be above 0")
    return value


def state(text: str) -> str:
    """An argparse type: a state that `parse_state` understands."""
    try:
        parse_state(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def picture(text: str) -> Path:
    """An argparse type: a file to draw into, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install -e '.[bench]'")
    return Path(text)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a result records them: without paths, which would name a person or a machine."""
    return {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
