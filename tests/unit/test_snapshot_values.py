"""State dicts as JSON plus named tensors: what goes in comes out, everything else is refused by key path."""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import DamagedError, UnsavableValueError
from engine.format.json import canonical_bytes, parse_canonical
from engine.snapshot.values import decode, encode, tensor_names


class Phase(str, enum.Enum):  # noqa: UP042  an old one, as state dicts have them
    WARM = "warm"


class Pair(NamedTuple):
    a: int
    b: int


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


def round_trip(value: Any) -> Any:
    """Through the bytes that a checkpoint would hold."""
    tensors: dict[str, torch.Tensor] = {}
    raw = canonical_bytes(encode(value, "key", tensors))
    return decode(parse_canonical(raw, what="the test"), tensors.__getitem__)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**63 - 1,
        1.5,
        -0.0,
        1e-310,
        "",
        'text with "quotes", a line\nbreak and ümlauts',
        [],
        {},
        (),
        [1, [2, [3]]],
        {"a": {"b": [1, 2]}},
        (1, ("two", (3.0,))),
        {1: "one", 2: {3: "three"}},
        {"1": "text", 1: "number"},
        {"$tensor": "not a tensor"},
        {"$float": "nan", "other": 1},
        collections.Counter({30: 1, 60: 2}),
        collections.Counter("text"),
        math.inf,
        -math.inf,
        [True, 1, 1.0],
    ],
    ids=repr,
)
def test_a_value_survives(value: Any) -> None:
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_nan_survives() -> None:
    assert math.isnan(round_trip({"best": math.nan})["best"])


@pytest.mark.parametrize("kind", [collections.OrderedDict, lambda items: collections.defaultdict(int, items)])
def test_dict_kinds_become_dicts(kind: Any) -> None:
    back = round_trip(kind({"b": 1, "a": (2,)}))
    assert back == {"b": 1, "a": (2,)}


def test_keys_that_are_an_enum_of_texts_are_those_texts() -> None:
    saved = round_trip({Phase.WARM: 1, "more": {Phase.WARM: torch.ones(2)}})
    assert saved == {"warm": 1, "more": {"warm": saved["more"]["warm"]}}
    assert saved[Phase.WARM] == 1, "it is found by the same key again"


def test_the_order_of_integer_keys_survives() -> None:
    assert list(round_trip({3: "c", 1: "a", 2: "b"})) == [3, 1, 2]


def test_tensors_are_taken_out_under_dotted_names() -> None:
    tensors: dict[str, torch.Tensor] = {}
    first, second, third = torch.ones(2), torch.zeros(()), torch.arange(3)
    document = encode({"a": [first, {"b": second}], "c": (third,)}, "loader", tensors)
    assert list(tensors) == ["loader.a.0", "loader.a.1.b", "loader.c.0"]
    assert tensors["loader.a.0"] is first, "a capture copies nothing"
    assert tensor_names(document) == list(tensors)
    back = decode(document, tensors.__getitem__)
    assert back["a"][0] is first
    assert back["a"][1]["b"] is second
    assert back["c"] == (third,)


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"a": {"b": object()}}, "key.a.b", "builtins.object"),
        ({"a": [0, {1, 2}]}, "key.a.1", "builtins.set"),
        ({"a": lambda: None}, "key.a", "builtins.function"),
        ({"a": b"bytes"}, "key.a", "builtins.bytes"),
        ({"a": 1j}, "key.a", "builtins.complex"),
        ({"a": np.zeros(3)}, "key.a", "numpy.ndarray"),
        ({"a": np.float64(1)}, "key.a", "numpy.float64"),
        ({"a": np.int64(1)}, "key.a", "numpy.int64"),
        ({"a": Pair(1, 2)}, "key.a", "Pair"),
        ({"a": Settings()}, "key.a", "Settings"),
        ({"a": pathlib.Path("x")}, "key.a", "Path"),
        ({"a": torch.float32}, "key.a", "torch.dtype"),
        ({"a": torch.device("cpu")}, "key.a", "torch.device"),
        ({"a": torch.Generator()}, "key.a", "Generator"),
        ({1: {"x": object()}}, "key.1.x", "builtins.object"),
    ],
)
def test_what_is_neither_tensor_nor_json_is_refused_by_path(value: Any, path: str, kind: str) -> None:
    with pytest.raises(UnsavableValueError) as caught:
        encode(value, "key", {})
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert kind in message
    assert "state_dict()" in message, "says what to do"


@pytest.mark.parametrize("number", [2**63, -(2**63), -(2**63) - 1, 10**30])
def test_integers_beyond_64_bits_are_refused_at_capture(number: int) -> None:
    with pytest.raises(UnsavableValueError, match=r"key\.n: the integer"):
        encode({"n": number}, "key", {})


def test_text_keys_that_are_not_unicode_are_refused_too() -> None:
    with pytest.raises(UnsavableValueError, match=r"key\.a: .* is not Unicode"):
        encode({"a": {"\udfff": 1}}, "key", {})


@pytest.mark.parametrize("key", [1.5, None, (1, 2), True, b"x"])
def test_keys_are_text_or_integers(key: Any) -> None:
    with pytest.raises(UnsavableValueError, match=r"key\.a: the key .* keys must be text or integers"):
        encode({"a": {key: 1}}, "key", {})


def test_integer_keys_fit_into_64_bits_too() -> None:
    with pytest.raises(UnsavableValueError, match=r"key\.a: the key 1180591620717411303424"):
        encode({"a": {2**70: 1}}, "key", {})


def test_a_cycle_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(UnsavableValueError, match="nested deeper"):
        encode(loop, "key", {})


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(UnsavableValueError, match=r"key\.a\.b: two tensors have the same name"):
        encode({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, "key", {})


def deep(levels: int, wrap: Any) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap",
    [lambda v: [v], lambda v: {"k": v}, lambda v: (v,), lambda v: {1: v}],
    ids=["list", "dict", "tuple", "items"],
)
@pytest.mark.parametrize("levels", [10, 20, 48])
def test_what_is_accepted_can_be_written(wrap: Any, levels: int) -> None:
    """Whatever `encode` lets through fits the canonical JSON of a manifest, where depth is bounded, too."""
    value = deep(levels, wrap)
    try:
        document = encode(value, "key", {})
    except UnsavableValueError:
        assert levels > 10
        return
    canonical_bytes({"objects": {"key": document}})


def test_text_that_is_not_unicode_is_refused_at_capture() -> None:
    with pytest.raises(UnsavableValueError, match=r"key\.a"):
        encode({"a": "\ud800"}, "key", {})


@pytest.mark.parametrize(
    "document",
    [
        {"$tensor": 1},
        {"$float": "1.0"},
        {"$tuple": {}},
        {"$items": [[1]]},
        {"$items": [[None, 1]]},
        {"$items": 3},
        {"$pickle": "gASVBAAAAAAAAABLAS4="},
        {"$tensor": "a", "$tuple": []},
        {"a": {"$unknown": 1}},
    ],
    ids=repr,
)
def test_forms_that_were_never_written_are_damage(document: Any) -> None:
    with pytest.raises(DamagedError):
        decode(document, lambda name: torch.zeros(1))


def kinds(value: Any) -> Any:
    """Types all the way down; the order of text keys is not kept, JSON being canonical."""
    if isinstance(value, list | tuple):
        return type(value), [kinds(item) for item in value]
    if isinstance(value, dict):
        return dict, {(type(key), key): kinds(item) for key, item in value.items()}
    return type(value), repr(value)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("$.ab", max_size=4) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_any_value_of_these_kinds_survives(value: Any) -> None:
    back = round_trip(value)
    assert back == value
    assert kinds(back) == kinds(value)
