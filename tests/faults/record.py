"""How much each test of the fault suite covered. Printed at the end of a run, and kept in docs/guarantees.md.

`HOLDFAST_RECORD=1 python -m pytest tests/faults` writes that run's counts into the document.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "guarantees.md"
ASK = "HOLDFAST_RECORD"
_COUNT = re.compile(r"<!--n (?P<test>\S+)-->[\d,]*<!---->")

counts: Counter[str] = Counter()


def add(node: str, count: int) -> None:
    """Add to the count of a test; its parameters are summed up."""
    counts[name_of(node)] += count


def name_of(node: str) -> str:
    """tests/faults/test_save.py::test_x[a-1] -> test_save.py::test_x"""
    return node.partition("[")[0].rpartition("/")[2]


def lines() -> list[str]:
    return [f"covered {count:>7,} by {name}" for name, count in sorted(counts.items())]


def write_if_asked() -> None:
    """Replace the counts in the document by this run's; those of tests that did not run stay."""
    if os.environ.get(ASK) != "1" or not DOCUMENT.exists():
        return

    def replace(found: re.Match[str]) -> str:
        count = counts.get(found["test"])
        return found[0] if count is None else f"<!--n {found['test']}-->{count:,}<!---->"

    text = DOCUMENT.read_text()
    DOCUMENT.write_text(_COUNT.sub(replace, text))
