"""Merges the ranks' JSON values into one for each state key.

Receipts carry digests of the values. If a key's digests are equal and rank 0 has the key, rank 0's value is
used. Otherwise rank 0 asks one rank per digest for its value and merges the answers:

    module      submodule name -> value (extra state): the union; where ranks differ, the lowest rank's value
    optimizer   the union by parameter names, if the ranks' optimizers have different parameters
    any other   must be equal on all ranks that have the key

    rank 0       receipts -> the values that it needs -> all ranks
    every rank   the values that it was asked for -> rank 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from engine.errors import StateError
from engine.format.digest import bytes_digest
from engine.format.forms import without_order
from engine.format.json import canonical_bytes, parse_canonical
from engine.ranks.coordination import Channel
from engine.state.sharing import union_of_values

Kind = Literal["module", "optimizer", "value"]
Json = Any

ASKING = b"values of "
"""Prefix of rank 0's request for values, sent in place of the outcome."""

_SHOWN_CHARS = 80


def digest(value: Any) -> str:
    """Digest of a value that ranks compare. Ignores key order, which is random in a dict made from a set."""
    raw = canonical_bytes(value)
    return bytes_digest(canonical_bytes(without_order(value)) if b'{"$items":' in raw else raw)


def values_to_ask(shared: Sequence[Mapping[str, str]]) -> dict[int, list[str]]:
    """The keys whose values rank 0 needs, by rank, given all ranks' digests. Pure.

    Includes rank 0's own values where another rank's differs.
    """
    wanted: dict[int, list[str]] = {}
    for key in sorted({key for digests in shared for key in digests}):
        first: dict[str, int] = {}
        for rank, digests in enumerate(shared):
            if key in digests:
                first.setdefault(digests[key], rank)
        if len(first) > 1 or key not in shared[0]:
            for rank in first.values():
                wanted.setdefault(rank, []).append(key)
    return wanted


def ask(
    channel: Channel, key: str, wanted: Mapping[int, list[str]], own: bytes, timeout_secs: float
) -> list[dict[str, tuple[Kind, Json]]]:
    """On rank 0: collect the values in `wanted` from their ranks. `own` is rank 0's own `answer`."""
    request = canonical_bytes({str(rank): keys for rank, keys in wanted.items()})
    channel.broadcast(f"{key}/outcome", ASKING + request, 0)
    raws = channel.gather(f"{key}/values", own, timeout_secs)
    channel.forget([f"{key}/outcome"])
    assert raws is not None, "only rank 0 asks"
    return [
        {name: (kind, value) for name, (kind, value) in parse_canonical(raw, what="values").items()}
        for raw in raws
    ]


def answer(wanted: bytes, rank: int, kinds: Mapping[str, Kind], objects: Mapping[str, Json]) -> bytes:
    """This rank's values for rank 0's request, which begins with `ASKING`."""
    keys = parse_canonical(wanted.removeprefix(ASKING), what="rank 0's request").get(str(rank), ())
    return canonical_bytes({key: [kinds.get(key, "value"), objects[key]] for key in keys})


def merge(
    objects: Mapping[str, Json],
    told: Sequence[Mapping[str, tuple[Kind, Json]]],
    merge_optimizers: Callable[[str, list[Json]], Json],
) -> tuple[dict[str, Json], list[str]]:
    """One value for each key, and a sentence for each key whose values cannot be merged. Pure.

    Args:
        objects: rank 0's own values.
        told: the values that each rank was asked for, by rank.
    """
    merged = dict(objects)
    problems = []
    for key in sorted({key for values in told for key in values}):
        given = [(rank, *values[key]) for rank, values in enumerate(told) if key in values]
        try:
            merged[key] = _one(key, given, merge_optimizers)
        except StateError as error:
            problems.append(str(error))
    return merged, problems


def _one(
    key: str, given: Sequence[tuple[int, Kind, Json]], merge_optimizers: Callable[[str, list[Json]], Json]
) -> Json:
    first_rank, kind, first = given[0]
    for rank, other, _ in given:
        if other != kind:
            raise StateError(f"{key} is a {kind} on rank {first_rank} and a {other} on rank {rank}")
    if kind == "module":
        return union_of_values([value for _, _, value in given])
    sharded = kind == "optimizer" and any(value.get("sharded") for _, _, value in given)
    if sharded or (kind == "optimizer" and len({_parameters(value) for _, _, value in given}) > 1):
        return merge_optimizers(key, [value for _, _, value in given])
    for rank, _, value in given[1:]:
        path, one, other = first_difference(key, first, value)
        if path:
            raise StateError(
                f"{path} differs on rank {rank}: {_show(other)} there, {_show(one)} on rank {first_rank}"
            )
    return first


def first_difference(path: str, one: Json, two: Json) -> tuple[str, Json, Json]:
    """(key path, value, value) of the first difference of two JSON values; ("", ...) if there is none."""
    if _is_plain_dict(one) and _is_plain_dict(two):
        for key in sorted({*one, *two}):
            if key not in one or key not in two:
                return f"{path}.{key}", one.get(key, _NOTHING), two.get(key, _NOTHING)
            found = first_difference(f"{path}.{key}", one[key], two[key])
            if found[0]:
                return found
        return "", None, None
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for number, (left, right) in enumerate(zip(one, two, strict=True)):
            found = first_difference(f"{path}[{number}]", left, right)
            if found[0]:
                return found
        return "", None, None
    return ("", None, None) if type(one) is type(two) and one == two else (path, one, two)


_NOTHING = "nothing"


def _is_plain_dict(value: Json) -> bool:
    return isinstance(value, dict) and not any(key.startswith("$") for key in value)


def _parameters(document: Json) -> frozenset[str]:
    """The names of an optimizer's parameters."""
    return frozenset(str(name) for group in document["param_groups"] for name in group["params"])


def _show(value: Json) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
