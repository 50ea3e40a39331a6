"""A command line out of a dataclass, by tyro; its boxes of many lines become one sentence."""

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
    """Flags, spelled with underscores or dashes, over `default`, a value of the dataclass.

    Args:
        error: raised with one sentence for a flag that does not exist or takes no such value. What the
            dataclass itself raises of this class, for a value that cannot work, is passed on as it is.
        speaks: whether this process prints what `--help` asks for; the program ends with 0 after that.
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
    """What tyro says in a box of many lines, in one. Its rules become semicolons, its title goes."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip("│| ")
        if text.strip("╰╯─+-"):
            parts[-1].append(text)
        else:
            parts.append([])
    return "; ".join(" ".join(part) for part in parts if part)


def _cause(error: BaseException | None, kind: type[Exception]) -> Exception | None:
    """The refusal that tyro turned into an exit: it draws a box around any ValueError of a constructor."""
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error
