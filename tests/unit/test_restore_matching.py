"""Does a checkpoint fit the state: matched by any of a tensor's names, every difference reported at once."""

from __future__ import annotations

import pytest

from engine.format.manifest import TensorInfo
from engine.restore.matching import Match, match_tensors, report

F32 = TensorInfo("F32", (2, 3))
BF16 = TensorInfo("BF16", (2, 3))
LONG = TensorInfo("F32", (4, 3))


@pytest.mark.parametrize(
    ("live", "live_aliases", "saved", "saved_aliases", "expected"),
    [
        ({}, {}, {}, {}, Match()),
        ({"a": F32}, {}, {"a": F32}, {}, Match({"a": "a"})),
        ({"a": F32}, {}, {}, {}, Match(missing=("a",))),
        ({}, {}, {"a": F32}, {}, Match(unexpected=("a",))),
        (
            {"a": F32},
            {},
            {"a": LONG},
            {},
            Match(mismatched=("a: saved as F32 [4, 3], here F32 [2, 3]",)),
        ),
        (
            {"a": F32},
            {},
            {"a": BF16},
            {},
            Match(mismatched=("a: saved as BF16 [2, 3], here F32 [2, 3]",)),
        ),
        # Tied both times, under the same or another first name.
        ({"a": F32}, {"b": "a"}, {"a": F32}, {"b": "a"}, Match({"a": "a"})),
        ({"a": F32}, {"b": "a"}, {"b": F32}, {"a": "b"}, Match({"a": "b"})),
        # The checkpoint knows only one of the names.
        ({"a": F32}, {"b": "a"}, {"b": F32}, {}, Match({"a": "b"})),
        ({"b": F32}, {}, {"a": F32}, {"b": "a"}, Match({"b": "a"})),
        # Tied when saved, apart now: both get the same values.
        ({"a": F32, "b": F32}, {}, {"a": F32}, {"b": "a"}, Match({"a": "a", "b": "a"})),
        # Apart when saved, tied now: which values should it get?
        ({"a": F32}, {"b": "a"}, {"a": F32, "b": F32}, {}, Match({"a": "a"}, unexpected=("b",))),
        # An alias that leads nowhere is no match.
        ({"b": F32}, {}, {"c": F32}, {"b": "a"}, Match(missing=("b",), unexpected=("c",))),
        # A mismatch is not unexpected as well, also under another name.
        (
            {"a": F32},
            {"b": "a"},
            {"b": LONG},
            {},
            Match(mismatched=("a: saved as F32 [4, 3], here F32 [2, 3]",)),
        ),
        # Everything at once.
        (
            {"a": F32, "c": F32, "d": LONG},
            {},
            {"a": F32, "b": F32, "d": F32},
            {},
            Match({"a": "a"}, ("c",), ("b",), ("d: saved as F32 [2, 3], here F32 [4, 3]",), {"d": "d"}),
        ),
    ],
)
def test_match(
    live: dict[str, TensorInfo],
    live_aliases: dict[str, str],
    saved: dict[str, TensorInfo],
    saved_aliases: dict[str, str],
    expected: Match,
) -> None:
    assert match_tensors(live, live_aliases, saved, saved_aliases) == expected


@pytest.mark.parametrize(
    ("match", "exact"),
    [
        (Match({"a": "a"}), True),
        (Match(missing=("a",)), False),
        (Match(unexpected=("a",)), False),
        (Match(mismatched=("a",)), False),
    ],
)
def test_exact_means_no_difference_at_all(match: Match, exact: bool) -> None:
    assert match.exact is exact


def test_the_report_names_every_kind_of_difference() -> None:
    text = report(Match({}, ("m1", "m2"), ("u1",), ("d1: saved as …",)), "the checkpoint /x/step-1")
    assert text.startswith("the checkpoint /x/step-1 does not fit")
    assert "nothing was changed" in text
    for line in (
        "missing in the checkpoint (2)",
        "m1",
        "m2",
        "not in the state (1)",
        "u1",
        "different (1)",
        "d1",
    ):
        assert line in text
    assert text.endswith("choose another checkpoint")


def test_a_long_report_says_how_many_more() -> None:
    text = report(Match(missing=tuple(f"name{n}" for n in range(50))), "it")
    assert "missing in the checkpoint (50)" in text
    assert "name19" in text
    assert "name20" not in text
    assert "… and 30 more" in text
