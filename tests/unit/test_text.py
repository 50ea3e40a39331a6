"""Sizes and rates: the right unit on both sides of every boundary, and never an exponent."""

from __future__ import annotations

import pytest

from engine.text import readable_bytes, readable_rate


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (999.4, "999 B"),
        (999.5, "1 kB"),
        (1000, "1 kB"),
        (1004, "1 kB"),
        (1005.1, "1.01 kB"),
        (86_048, "86 kB"),
        (99_949, "99.9 kB"),
        (99_951, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (999_900, "1 MB"),
        (1_000_000, "1 MB"),
        (10_400_000, "10.4 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1 GB"),
        (1.49e9, "1.49 GB"),
        (1_493_000_000, "1.49 GB"),
        (999_499_999_999, "999 GB"),
        (999_500_000_000, "1 TB"),
        (2e12, "2 TB"),
        (999_500_000_000_000, "1 PB"),
        (5 * 10**15, "5 PB"),
        (5_400 * 10**15, "5,400 PB"),
        (-999_900, "-1 MB"),
    ],
)
def test_sizes_have_three_digits_and_the_fitting_unit(count: float, shown: str) -> None:
    assert readable_bytes(count) == shown


@pytest.mark.parametrize(
    ("count", "secs", "shown"),
    [(812_000_000, 1.0, "812 MB/s"), (999_900, 1.0, "1 MB/s"), (1_000, 2.0, "500 B/s"), (5, 0.0, "-")],
)
def test_rates(count: float, secs: float, shown: str) -> None:
    assert readable_rate(count, secs) == shown
