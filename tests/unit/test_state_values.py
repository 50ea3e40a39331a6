"""State dicts as JSON plus named tensors: what goes in comes out, everything else is refused by key path."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import math
import pathlib
import re
import struct
import sys
import types
import zoneinfo
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import DamagedError, StateMismatchError, UnsavableValueError
from engine.format.forms import FORMS, version_needed
from engine.format.json import canonical_bytes, parse_canonical
from engine.state.values import decode, encode, missing_classes, tensor_names


class Phase(str, enum.Enum):  # noqa: UP042  an old one, as state dicts have them
    WARM = "warm"


class Pair(NamedTuple):
    a: int
    b: int


class Level(enum.IntFlag):
    LOW = 1
    HIGH = 2


class Outer:
    class Inner(enum.Enum):
        ONE = object()


class Ints(list[int]):
    pass


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Odd(datetime.tzinfo):
    pass


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


ZONE = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
MOMENT = datetime.datetime(2026, 10, 25, 2, 30, 0, 7)


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        -(2**63),
        -(10**30),
        1j,
        complex(math.inf, -0.0),
        b"",
        b"\x00\xff",
        bytearray(b"ab"),
        set(),
        {("two", (3, 4.0), None)},
        frozenset({1, 2}),
        collections.deque([1, 2], maxlen=5),
        collections.deque(),
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.defaultdict(list, {"b": [1], "a": []}),
        collections.defaultdict(None, {"b": 1}),
        collections.Counter({(1, 2): 3}),
        {(1, "a"): 1, 1.5: 2, None: 3, True: 4, b"x": 5},
        {2**70: 1},
        {frozenset({1}): {"$set": 1}},
        Pair(1, 2),
        [Pair(1, {"x": Pair(2, (3,))})],
        Phase.WARM,
        {Phase.WARM: Phase.WARM},
        Level.HIGH,
        Outer.Inner.ONE,
        pathlib.Path("/a/b"),
        pathlib.PurePosixPath("a"),
        pathlib.PureWindowsPath("c:\\x"),
        MOMENT,
        MOMENT.replace(tzinfo=datetime.UTC),
        MOMENT.replace(tzinfo=ZONE),
        MOMENT.replace(tzinfo=datetime.timezone(datetime.timedelta(0), "name")),
        MOMENT.replace(tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1),
        MOMENT.date(),
        MOMENT.time(),
        datetime.timedelta(-3, 4, 5),
        ZONE,
        zoneinfo.ZoneInfo("UTC"),
        torch.float32,
        torch.float8_e4m3fn,
        torch.device("cuda:1"),
        torch.device("cpu"),
        torch.Size([2, 3]),
        torch.Size([]),
        np.float64(1.5),
        np.float32(-0.0),
        np.int8(-3),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex128(1 + 2j),
        np.str_("text"),
        np.str_(""),
        np.bytes_(b"ab"),
        np.datetime64("2026-01-02T03:04:05", "us"),
        np.timedelta64(5, "D"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value)),  # every worker collects the same
)
def test_a_value_that_json_lacks_survives(value: Any) -> None:
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_a_deque_keeps_its_bound_and_a_default_dict_its_factory() -> None:
    assert round_trip(collections.deque([1], maxlen=3)).maxlen == 3
    assert round_trip(collections.defaultdict(list)).default_factory is list


def test_what_a_modules_state_dict_knows_besides_its_keys_survives() -> None:
    saved = torch.nn.BatchNorm1d(2).state_dict()
    back = round_trip({"m": saved})["m"]
    assert type(back) is collections.OrderedDict
    assert back._metadata == saved._metadata  # type: ignore[attr-defined]
    assert back._metadata[""] == {"version": 2}


def test_nested_sets_are_spelled_alike_in_every_process() -> None:
    texts = [chr(97 + number) * 3 for number in range(20)]
    spelled = [encode(set(order), "key", {}) for order in (texts, texts[::-1])]
    assert spelled[0] == spelled[1] == {"$set": sorted(texts)}


@pytest.mark.parametrize("raw", ["fff8000000000000", "7ff8000000000001", "7ff0000000000001"])
def test_the_payload_of_nan_survives(raw: str) -> None:
    (value,) = struct.unpack(">d", bytes.fromhex(raw))
    for kind in (float, np.float64):
        assert struct.pack(">d", round_trip(kind(value))).hex() == raw


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.arange(6).reshape(2, 3).T,
    np.arange(12)[::-2],
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 3)),
    np.array(7, dtype=np.uint64),
    np.array([True, False]),
    np.array([1 + 2j], dtype=np.complex64),
    np.array([[1 + 2j, 3j]], dtype=np.complex128),
    np.array(["a", "text"]),
    np.array([], dtype="U3"),
    np.array([b"a", b"text"]),
    np.array(["2026-01-02", "NaT"], dtype="M8[ns]"),
    np.array([1, 2], dtype="m8[25s]"),
    np.array([1.5, np.nan], dtype=np.float16),
    np.array([1, 2], dtype=">u8"),
    np.array([1 + 2j], dtype=">c16"),
    np.broadcast_to(np.arange(3), (2, 3)),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_an_array_survives(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    document = encode({"a": [value]}, "key", tensors)
    back = decode(document, lambda name: tensors[name].clone(memory_format=torch.contiguous_format))["a"][0]
    assert type(back) is np.ndarray
    assert back.dtype.str == value.dtype.str
    assert back.shape == value.shape
    assert back.tobytes() == value.tobytes()
    assert back.flags.f_contiguous or not value.flags.f_contiguous


def test_an_array_is_captured_over_its_own_memory() -> None:
    tensors: dict[str, torch.Tensor] = {}
    array = np.zeros(4)
    encode({"a": array}, "key", tensors)
    assert tensors["key.a"].data_ptr() == array.ctypes.data


@pytest.mark.parametrize(("keep", "order"), [(True, ["z", "a"]), (False, ["a", "z"])])
def test_the_order_of_text_keys_survives_where_that_is_asked_for(keep: bool, order: list[str]) -> None:
    raw = canonical_bytes(encode({"d": {"z": 1, "a": 2}}, "key", {}, keep_order=keep))
    assert list(decode(parse_canonical(raw, what="the test"), torch.empty)["d"]) == order


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
        ({"a": [0, {object}]}, "key.a.1", "builtins.type"),
        ({"a": lambda: None}, "key.a", "builtins.function"),
        ({"a": Settings()}, "key.a", "Settings"),
        ({"a": Ints()}, "key.a", "Ints"),
        ({"a": torch.Generator()}, "key.a", "torch._C.Generator"),
        ({"a": np.random.default_rng(0)}, "key.a", "numpy.random._generator.Generator"),
        ({"a": np.ma.array([1])}, "key.a", "MaskedArray"),
        ({"a": types.SimpleNamespace()}, "key.a", "SimpleNamespace"),
        ({1: {"x": object()}}, "key.1.x", "builtins.object"),
    ],
)
def test_what_has_no_form_is_refused_by_path(value: Any, path: str, kind: str) -> None:
    with pytest.raises(UnsavableValueError) as caught:
        encode(value, "key", {})
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert kind in message
    assert message.rpartition("; ")[2], "says what to do"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.array([object()]), r"key: NumPy's object is not plain data .* into a list"),
        (np.longdouble(1), r"key: NumPy's (float128|longdouble) is not plain data"),
        (np.zeros(2, dtype="i4,f4"), r"key: NumPy's \[.* is not plain data"),
        (collections.defaultdict(lambda: 0), r"key: a defaultdict's factory .* store dict\(\) of it"),
        (Level.LOW | Level.HIGH, r"key: .* combines members of an enum; store its \.value"),
        ({torch.ones(1): 1}, r"a tensor in a key or a set; use a list or a dict"),
        (MOMENT.replace(tzinfo=Odd()), r"key: its time zone is a .*Odd; use datetime\.timezone"),
    ],
    ids=["objects", "longdouble", "structured", "factory", "flags", "tensor key", "zone"],
)
def test_what_does_not_fit_its_form_is_refused(value: Any, words: str) -> None:
    with pytest.raises(UnsavableValueError, match=words):
        encode(value, "key", {})


def test_a_class_that_no_other_process_could_find_is_refused() -> None:
    class Local(enum.Enum):
        ONE = 1

    class LocalPair(NamedTuple):
        a: int

    for value, instead in ((Local.ONE, "its .value"), (LocalPair(1), "a tuple or a dict")):
        with pytest.raises(UnsavableValueError, match=rf"key\.x: the class .* or store {instead}"):
            encode({"x": value}, "key", {})


def test_a_class_is_never_imported_by_its_stored_name() -> None:
    document = {"x": {"$enum": {"type": "this:Nothing", "name": "ONE"}}}
    assert "this" not in sys.modules
    with pytest.raises(StateMismatchError, match="no such class in this: import that module before"):
        decode(document, torch.empty)
    assert "this" not in sys.modules
    assert len(missing_classes(document)) == 1


def test_a_class_is_looked_up_without_running_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lazy_module")
    module.__getattr__ = lambda name: pytest.fail(f"asked for {name}")  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_module", module)
    assert len(missing_classes({"$enum": {"type": "lazy_module:Thing", "name": "ONE"}})) == 1


@pytest.mark.parametrize(
    ("form", "inner"),
    [
        ("$enum", {"type": f"{__name__}:Phase", "name": "COLD"}),
        ("$enum", {"type": "builtins:list", "name": "append"}),
        ("$enum", {"type": "os:system", "name": "x"}),
        ("$namedtuple", {"type": f"{__name__}:Pair", "fields": ["a", "c"], "items": [1, 2]}),
        ("$namedtuple", {"type": "builtins:tuple", "fields": ["a"], "items": [1]}),
        ("$namedtuple", {"type": f"{__name__}:Settings", "fields": [], "items": []}),
    ],
)
def test_a_class_that_is_another_by_now_is_refused(form: str, inner: Any) -> None:
    with pytest.raises(StateMismatchError):
        decode({form: inner}, torch.empty)


def test_version_2_is_declared_exactly_where_a_value_needs_it() -> None:
    old = {"a": [1, {"$tuple": [{"$float": "nan"}]}], "b": {"$items": [[1, {"$tensor": "x"}]]}}
    assert version_needed(old) == 1
    assert {form for form, version in FORMS.items() if version == 1} == {
        "$tensor",
        "$tuple",
        "$float",
        "$items",
        "$counter",
    }, "old readers know these, and no others"
    for form, version in FORMS.items():
        assert version_needed({"a": [{"b": {"$tuple": [{form: 0}]}}]}) == version


def test_text_keys_that_are_not_unicode_are_refused_too() -> None:
    with pytest.raises(UnsavableValueError, match=r"key\.a: .* is not Unicode"):
        encode({"a": {"\udfff": 1}}, "key", {})


def test_a_cycle_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(UnsavableValueError, match="nested deeper"):
        encode(loop, "key", {})


def test_tensors_whose_paths_are_spelled_alike_are_both_kept() -> None:
    one, two, three = torch.ones(1), torch.zeros(1), torch.full((1,), 3.0)
    back = round_trip({"a": {"b": one}, "a.b": two, "c": {1: three, "1": one}})
    assert back["a"]["b"] is one
    assert back["a.b"] is two
    assert back["c"][1] is three
    assert back["c"]["1"] is one


def deep(levels: int, wrap: Any) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: [v],
        lambda v: {"k": v},
        lambda v: (v,),
        lambda v: {1: v},
        lambda v: {None: v},
        lambda v: collections.deque([v]),
        lambda v: frozenset([v]),
        lambda v: Pair(v, 1),
    ],
    ids=["list", "dict", "tuple", "items", "mapping", "deque", "set", "named"],
)
@pytest.mark.parametrize("levels", [10, 20, 48, 66])
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
        {"$int": "0x1"},
        {"$int": 5},
        {"$nan": "3ff0000000000000"},
        {"$nan": "7f"},
        {"$complex": [1]},
        {"$complex": ["a", 1]},
        {"$bytes": "%%"},
        {"$bytes": 5},
        {"$path": ["Path", "x"]},
        {"$path": ["PosixPath", 5]},
        {"$date": "yesterday"},
        {"$datetime": ["2026-01-01", 0]},
        {"$datetime": ["2026-01-01", 0, "No/Where"]},
        {"$timedelta": [1]},
        {"$timezone": [100, 0, 0]},
        {"$dtype": "nn"},
        {"$device": "toaster"},
        {"$size": [1.5]},
        {"$set": [[1]]},
        {"$set": 1},
        {"$deque": [1, [1, 2]]},
        {"$deque": [-1, []]},
        {"$mapping": {"kind": "Evil", "pairs": []}},
        {"$mapping": {"kind": "dict", "pairs": [[1]]}},
        {"$mapping": {"kind": "dict", "pairs": [[[1], 2]]}},
        {"$mapping": {"kind": "defaultdict", "pairs": [], "factory": "eval"}},
        {"$scalar": ["O", "00"]},
        {"$scalar": ["<f8", "00"]},
        {"$scalar": ["<f8", "00" * 16]},
        {"$scalar": ["<i4,<i4", "0000000000000000"]},
        {"$array": {"dtype": "<f8", "shape": [3], "order": "C", "data": {"$tensor": "a"}}},
        {"$array": {"dtype": "|O8", "shape": [1], "order": "C", "data": {"$tensor": "a"}}},
        {"$array": {"dtype": "<f8"}},
        {"$enum": "x"},
        {"$enum": {"type": 1, "name": "x"}},
        {"$namedtuple": {"type": "a:b", "items": []}},
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


@settings(max_examples=150)
@given(VALUES)
def test_any_value_of_these_kinds_survives(value: Any) -> None:
    back = round_trip(value)
    assert back == value
    assert kinds(back) == kinds(value)
