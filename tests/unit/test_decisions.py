"""DECISIONS.md: the index lists every entry, and the modules that the entries name exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "DECISIONS.md").read_text()


def test_the_index_lists_every_entry_with_its_status() -> None:
    entries = re.findall(r"^## (\d+)\. (.*)$", TEXT, re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \| \[(.*)\]\(#[^)]+\) \| (.+) \|$", TEXT, re.MULTILINE)
    assert [row[:2] for row in rows] == entries
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    assert all(re.match(r"in force|replaced|the trainer's", status) for *_, status in rows)


def test_every_module_that_an_entry_names_exists() -> None:
    named = re.findall(r"`(?:engine/)?([a-z_0-9]+/[a-z_0-9/]+\.py)`", TEXT)
    missing = [path for path in named if not any((ROOT / base / path).exists() for base in ("", "engine"))]
    assert missing == []
    assert len(named) > 20
