"""The forger of test_hostile.py: its dice alone decide, and what it makes is deep, but not without end."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.errors import DamagedError
from engine.format.json import MAX_DEPTH, parse_bounded
from tests.faults.forgery import DEEP, NASTY, Original, forge, mutated, nested

DOCUMENT: dict[str, Any] = {
    "digest": "0" * 32,
    "shards": [{"rank": 0, "files": [{"file": "a", "bytes": 7}], "index": {"file": "b"}}],
    "tensors": {"w": {"dtype": "F32", "shape": [4, 8]}, "b": {"dtype": "F32", "shape": [8]}},
}
SEEDS = range(400)
MOST_CHANGES = 3


def depth(value: Any) -> int:
    """Containers inside containers, counted without recursing."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        found, level = waiting.pop()
        if isinstance(found, dict | list):
            deepest = max(deepest, level)
            waiting += [(item, level + 1) for item in (found.values() if isinstance(found, dict) else found)]
    return deepest


def test_the_same_dice_forge_the_same_document_whatever_came_before() -> None:
    """Hypothesis replays examples. Containers that went in themselves were changed by the next mutation, for
    all later documents, and once one of them held itself no search through a document came to an end."""
    nasty = copy.deepcopy(NASTY)
    first = [json.dumps(mutated(copy.deepcopy(DOCUMENT), Random(seed))) for seed in SEEDS]
    assert nasty == NASTY
    again = [json.dumps(mutated(copy.deepcopy(DOCUMENT), Random(seed))) for seed in reversed(SEEDS)]
    assert first == again[::-1]


def test_forged_documents_reach_beyond_the_depth_that_is_read_and_are_bounded() -> None:
    depths = [depth(mutated(copy.deepcopy(DOCUMENT), Random(seed))) for seed in SEEDS]
    assert max(depths) > MAX_DEPTH, "the engine's own bound is never met"
    assert max(depths) <= depth(DOCUMENT) + MOST_CHANGES * max(DEEP)
    assert sum(found <= depth(DOCUMENT) + 3 for found in depths) > len(SEEDS) // 2, "most attack the values"


@pytest.mark.parametrize("levels", [1, 2, *DEEP])
def test_nested_lists_have_as_many_levels_as_asked(levels: int) -> None:
    raw = json.dumps(nested(levels)).encode()
    assert raw == b"[" * levels + b"]" * levels
    parse_bounded(raw, what="it", max_depth=levels)


def test_a_forged_file_that_is_too_deep_is_refused_for_that() -> None:
    original = Original("step-00000007-00000000", {"shard-00000.json": json.dumps(DOCUMENT).encode()})
    said = []
    for seed in SEEDS:
        try:
            parse_bounded(forge(original, "shard-00000.json", Random(seed)), what="it")
        except DamagedError as error:
            said.append(str(error))
    assert any("levels deep" in words for words in said), "the bound on the depth is never met"


def test_make_fuzz_runs_every_fuzzing_test() -> None:
    """It once ran the parsers only: "answer" is not in "answers"."""
    root = Path(__file__).resolve().parents[2]
    chosen = re.search(r"pytest tests/faults/test_hostile\.py -k (\w+)", (root / "Makefile").read_text())
    assert chosen is not None
    source = (root / "tests/faults/test_hostile.py").read_text()
    fuzzing = [
        body.partition("(")[0] for body in re.split(r"^def ", source, flags=re.MULTILINE) if "@fuzz(" in body
    ]
    assert len(fuzzing) == 2
    assert [test for test in fuzzing if chosen[1] not in test] == []
