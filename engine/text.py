"""Readable sizes and rates, in decimal units like those of disks."""

from __future__ import annotations


def readable_bytes(count: float) -> str:
    """1,490,000,000 -> "1.49 GB": three significant digits, in the unit that leaves fewer than 1000."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        # From 999.5 on, three digits round up to 1000, which `g` would print as 1e+03.
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if abs(value) < 999.5 else f"{value:,.0f} {unit}"


def readable_rate(count: float, secs: float) -> str:
    """Bytes per second: "812 MB/s"; "-" when no time has passed."""
    return f"{readable_bytes(count / secs)}/s" if secs > 0 else "-"
