"""docs/guarantees.md names tests that exist, and every test that counts is in it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults import record

TESTS = Path(__file__).resolve().parents[1]


def test_every_named_test_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", record.DOCUMENT.read_text())
    assert len(named) > 30
    for file, test in named:
        found = list(TESTS.rglob(file))
        assert found, f"there is no {file}"
        assert not test or any(f"def {test}(" in path.read_text() for path in found), f"no {test} in {file}"


def test_every_count_is_in_the_document() -> None:
    text = record.DOCUMENT.read_text()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for test, body in re.findall(
            r"^def (test_\w+)\(((?:.|\n)*?)(?=^def |\Z)", path.read_text(), re.MULTILINE
        ):
            if re.search(r"^    covered\(|^        covered\(", body, re.MULTILINE):
                assert f"<!--n {path.name}::{test}-->" in text, f"{path.name}::{test} is not in the document"


def test_a_count_is_one_for_all_parameters() -> None:
    assert record.name_of("tests/faults/test_x.py::test_y[a/b-1]") == "test_x.py::test_y"
