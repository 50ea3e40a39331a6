"""Ages, untrusted text and tables, as a terminal shows them."""

from __future__ import annotations

from collections.abc import Sequence

_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def age(secs: float) -> str:
    """How long ago, in the largest fitting unit: 3 min. A clock that runs ahead gives "now"."""
    if secs < 1:
        return "now"
    for unit_secs, unit in _AGES:
        if secs >= unit_secs:
            return f"{secs / unit_secs:.0f} {unit}"
    return f"{secs:.0f} s"


def printable(text: str) -> str:
    """Text from a file, fit for a terminal: control characters are spelled out, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """Columns under their headers, two spaces apart; those numbered in `right` are aligned to the right.

    Drawn here because importing rich takes longer than listing twenty checkpoints.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
