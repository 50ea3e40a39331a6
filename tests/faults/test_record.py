"""docs/guarantees.md names tests that exist, and every test that counts is in it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults import record
from tests.faults.layer import STORAGE_FAULTS, SYSTEM_FAULTS

TESTS = Path(__file__).resolve().parents[1]


def test_every_named_test_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", record.DOCUMENT.read_text())
    assert len(named) > 30
    for file, test in named:
        found = list(TESTS.rglob(file))
        assert found, f"there is no {file}"
        assert not test or any(f"def {test}(" in path.read_text() for path in found), f"no {test} in {file}"


PAINS = 17
"""Rows of "Known defects of other libraries": what users of other checkpointers reported."""


def section_of(title: str) -> str:
    return record.DOCUMENT.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_pain_names_a_test() -> None:
    section = section_of("Known defects of other libraries")
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == PAINS
    for row in rows:
        assert re.search(r"`test_\w+\.py::test_\w+`", row), f"no test is named: {row}"


def test_every_fault_is_in_the_table() -> None:
    section = section_of("Which fault is injected where")
    for fault in (*SYSTEM_FAULTS, *STORAGE_FAULTS):
        assert f"\n| {fault} " in section, f"{fault} is not in the table"


def test_every_count_is_in_the_document() -> None:
    text = record.DOCUMENT.read_text()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for test, body in re.findall(
            r"^def (test_\w+)\(((?:.|\n)*?)(?=^def |\Z)", path.read_text(), re.MULTILINE
        ):
            if re.search(r"^    covered\(|^        covered\(", body, re.MULTILINE):
                assert f"<!--n {path.name}::{test}-->" in text, f"{path.name}::{test} is not in the document"


def test_no_count_is_missing() -> None:
    missing = re.findall(r"<!--n ([\w.:]+)-->(?!\d)", record.DOCUMENT.read_text())
    assert missing == [], f"run `{record.ASK}=1 python -m pytest tests/faults`"


def test_a_count_is_one_for_all_parameters() -> None:
    assert record.name_of("tests/faults/test_x.py::test_y[a/b-1]") == "test_x.py::test_y"
