"""Parses a command line into a dataclass with tyro, and turns tyro's boxed errors into one sentence."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

Flags = TypeVar("Flags")


def parse_flags(
    default: Flags, argv: Sequence[str], *, prog: str, error: type[Exception], speaks: bool = True
) -> Flags:
    """Parse flags, spelled with underscores or dashes; the others keep the values of `default`, a dataclass.

    Args:
        error: raised with one sentence for an unknown flag or an invalid value. Errors of this class that the
            dataclass itself raises pass through unchanged.
        speaks: whether this process prints the `--help` text; the program then exits with 0.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(type(default), args=list(argv), default=default, use_underscores=True, prog=prog)
    except SystemExit as exit_:
        if (refusal := _cause(exit_, error)) is not None:
            raise refusal from None
        if exit_.code:
            raise error(one_sentence(err.getvalue())) from None
        if speaks:
            sys.stdout.write(out.getvalue())
        raise


def one_sentence(box: str) -> str:
    """A tyro error box on one line: rules become semicolons, the title is dropped."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip("│| ")
        if text.strip("╰╯─+-"):
            parts[-1].append(text)
        else:
            parts.append([])
    return "; ".join(" ".join(part) for part in parts if part)


def _cause(error: BaseException | None, kind: type[Exception]) -> Exception | None:
    """The dataclass's own error: tyro turns any ValueError of a constructor into an exit."""
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error
