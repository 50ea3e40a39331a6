"""Canonical JSON: one spelling per value, and nothing hostile gets as far as the parser's recursion."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DamagedError
from engine.format.json import (
    MAX_DEPTH,
    MAX_INT,
    canonical_bytes,
    decode_metric,
    encode_metric,
    parse_bounded,
    parse_canonical,
    unique_pairs,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INT, MAX_INT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(JSON)
def test_round_trip(value: object) -> None:
    raw = canonical_bytes(value)
    again = parse_canonical(raw, what="x")
    assert again == value
    assert canonical_bytes(again) == raw


@pytest.mark.parametrize(
    ("value", "raw"),
    [
        ({"b": 1, "a": [1, 2.5, None, True]}, b'{"a":[1,2.5,null,true],"b":1}'),
        ('ü\n"', '"ü\\n\\""'.encode()),
        ((1, (2,)), b"[1,[2]]"),
        ({}, b"{}"),
        (1e300, b"1e+300"),
    ],
)
def test_spelling(value: object, raw: bytes) -> None:
    assert canonical_bytes(value) == raw


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": {"b": [1, float("nan")]}}, r"a\.b\[1\] is nan"),
        (float("inf"), "the value is inf"),
        ({"a": 2**63}, "a is an integer beyond 64 bits"),
        ([-(2**63)], r"\[0\] is an integer beyond"),
        ({"a": {1, 2}}, "a is a set"),
        ({"a": b"x"}, "a is a bytes"),
        ({"a": {1: 2}}, "a has the key 1"),
        ({"a": "\ud800"}, "a holds text that is not Unicode"),
        ({"\ud800": 1}, "not Unicode"),
        (nested(MAX_DEPTH + 1), "nested more than 64"),
    ],
)
def test_refused_with_key_path(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        canonical_bytes(value)


@pytest.mark.parametrize("raw", [b'{"a":[1', b"[", b'{"a":1}}', b"[" * (MAX_DEPTH + 1)])
def test_a_document_that_was_cut_off_is_not_called_deep(raw: bytes) -> None:
    with pytest.raises(DamagedError, match="its brackets do not match"):
        parse_canonical(raw, what="x")


def test_a_document_that_is_too_deep_is_called_deep() -> None:
    with pytest.raises(DamagedError, match="nested more than 64"):
        parse_canonical(b"[" * 65 + b"]" * 65, what="x")


def test_deepest_allowed() -> None:
    assert parse_canonical(canonical_bytes(nested(MAX_DEPTH)), what="x") == nested(MAX_DEPTH)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1,]",
        b"nul",
        b'{"a": 1}',
        b'{"a":1}\n',
        b'{"b":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a":1,"a":2}',
        b'"\\u0041"',
        b'"\\u00fc"',
        b"1.0e0",
        b"1.50",
        b"-0",
        b"NaN",
        b"[Infinity]",
        b"1e400",
        b"9223372036854775808",
        b"9" * 5000,
        b"-" + b"9" * 5000,
        b'"\\ud800"',
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
    ],
)
def test_not_canonical(raw: bytes) -> None:
    with pytest.raises(DamagedError, match=r"^the index"):
        parse_canonical(raw, what="the index")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a":[1,9223372036854775808]}', r"a\[1\] is an integer beyond 64 bits"),
        (b'{"a":-9223372036854775808}', "a is an integer beyond 64 bits"),
        (b'{"a":{"b":1e400}}', r"a\.b is inf"),
        (b'{"a":"\\ud800"}', "a holds text that is not Unicode"),
        (b'{"\\ud800":1}', "not Unicode"),
        (b"[" + b"1" * 20 + b"]", "an integer of 20 digits"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(raw: bytes, words: str) -> None:
    with pytest.raises(DamagedError, match=rf"^the index .*{words}"):
        parse_canonical(raw, what="the index")


def test_long_fractions_are_not_taken_for_long_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every integer of a document with a long one goes through Python; a learning rate must not do that."""
    value = {"lr": 0.00012345678901234567, "offsets": [0, 123456789012345678]}
    raw = canonical_bytes(value)
    assert b"0.00012345678901234567" in raw
    monkeypatch.setattr("engine.format.json._int", None)
    monkeypatch.setattr("engine.format.json._check", None)
    assert parse_canonical(raw, what="x") == value


@pytest.mark.parametrize("value", [MAX_INT, -MAX_INT, [MAX_INT, 0.1, MAX_INT - 1]])
def test_integers_of_64_bits(value: object) -> None:
    assert parse_canonical(canonical_bytes(value), what="x") == value


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 65 + b"]" * 65,
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b'[{"a":' * 65 + b"1" + b"}]" * 65,
        b"[" * 1_000_000,
        b"[" * 1_000_000 + b"]" * 1_000_000,
        b'{"a":' * 300_000,
        b'["",' * 200_000 + b"1" + b"]" * 200_000,
        b"[}" * 200_000,
        b'"\\"' * 300_000 + b"[" * 300_000,
    ],
)
def test_depth_is_bounded_before_parsing(raw: bytes) -> None:
    """Also in a program that raised the recursion limit, where the parser itself would overflow the stack."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        with pytest.raises(DamagedError):
            parse_bounded(raw, what="x")
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("between", ['\\"', "\\", "", "\x00"])
def test_brackets_in_text_are_not_nesting(between: str) -> None:
    value = {"a": "[" * 1000 + between + "{" * 1000, "[" * 100: "]"}
    assert parse_canonical(canonical_bytes(value), what="x") == value
    with pytest.raises(DamagedError, match="not valid JSON"):  # a string that does not end
        parse_bounded(canonical_bytes(value["a"])[:-1], what="x")


def test_long_documents_are_not_split_at_their_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two bytes would take twenty times their size."""
    monkeypatch.setattr("engine.format.json._MAX_SPLIT_BYTES", 3)
    assert parse_bounded(b'"a"', what="x") == "a"
    monkeypatch.setattr("engine.format.json._STRING", None)
    assert parse_bounded(b'"b"', what="x") == "b"
    with pytest.raises(AttributeError):  # what is looked for instead is gone
        parse_bounded(b'"ab"', what="x")


def test_escaped_quotes_take_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unterminated string of escaped quotes: matching must not start over at each of them."""
    with pytest.raises(DamagedError, match="not valid JSON"):
        parse_bounded(b'"' + b'\\"' * 2_000_000, what="x")


def test_size_is_bounded() -> None:
    assert parse_canonical(b"[1,2]", what="x", max_bytes=5) == [1, 2]
    with pytest.raises(DamagedError, match="5 bytes, more than the limit of 4"):
        parse_canonical(b"[1,2]", what="x", max_bytes=4)


def test_number_of_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is parsed before: a list of empty lists would take 30 times its size."""
    monkeypatch.setattr("engine.format.json.MAX_VALUES", 100)
    assert parse_bounded(b"[" + b"[]," * 49 + b"0]", what="x")
    monkeypatch.setattr("json.loads", None)
    for raw in (b"[" + b"[]," * 60 + b"0]", b'{"a":' * 101, b"[" + b"0," * 100 + b"0]"):
        with pytest.raises(DamagedError, match="limit of 100"):
            parse_bounded(raw, what="x")


def test_unique_pairs() -> None:
    nested_twice = parse_bounded(b'{"a": 1, "b": {"a": 2}}', what="x", pairs_hook=unique_pairs)
    assert nested_twice == {"a": 1, "b": {"a": 2}}
    with pytest.raises(DamagedError, match="same key twice"):
        parse_bounded(b'{"b": {"a": 2, "a": 2}}', what="x", pairs_hook=unique_pairs)


@pytest.mark.parametrize("value", [0.0, 3.25, -1e-300, float("inf"), float("-inf"), float("nan")])
def test_metrics(value: float) -> None:
    stored = json.loads(json.dumps(encode_metric(value), allow_nan=False))
    assert repr(decode_metric(stored)) == repr(value)


@pytest.mark.parametrize("value", [None, True, "1.5", "NaN", "infinity", [1.0], {}])
def test_not_a_metric(value: object) -> None:
    with pytest.raises(ValueError, match="not a metric"):
        decode_metric(value)
