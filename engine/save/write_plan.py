"""The ranks' agreement on who writes what: once per structure, over the store, without a collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import PeerFailedError, StateError, may_pass
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.layout import Chunk
from engine.format.manifest import TensorInfo
from engine.ranks.agreement import VERDICT_GRACE_SECS
from engine.ranks.coordination import Channel
from engine.save.division import Part, divide
from engine.save.snapshot import chunk_to_json
from engine.state.sharing import (
    Group,
    Offer,
    all_aliases,
    groups_to_compare,
    one_sided_state,
    shared_boxes,
)

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Watched:
    """Boxes of one group that this rank compares with the group's other ranks.

    positions: in the rank's own list, in the group's order. fresh: those that were never compared.
    """

    group: int
    positions: tuple[int, ...]
    fresh: frozenset[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """One rank's work at each save until the structure changes.

    parts: what it writes. watched: what it compares.
    on_device: whether some rank holds tensors on a device.
    tensors, aliases, groups: of all ranks, for the manifest and messages about differences; on rank 0 only.
    """

    parts: list[Part]
    watched: list[Watched] = field(default_factory=list)
    on_device: bool = False
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    groups: Sequence[Group] = ()


@dataclass(slots=True)
class Compared:
    """What rank 0 remembers from plan to plan.

    boxes: those that a committed save compared whole, with their holders.
    differing: names of large buffers that have differed; every rank's own value is kept from then on.
    """

    boxes: set[tuple[Chunk, tuple[int, ...]]] = field(default_factory=set)
    differing: set[str] = field(default_factory=set)


def agree_on_plan(
    channel: Channel,
    key: str,
    offer: Offer,
    problem: Exception | None,
    timeout_secs: float,
    compared: Compared | None = None,
    what: str = "",
) -> Plan:
    """Tell rank 0 what this rank holds, and receive what it writes.

    Every rank calls it for the same save. A rank that has already failed passes its `problem`, so that no
    rank waits for it. `compared` is used on rank 0; None: nothing is compared.
    Raises: `problem`; PeerFailedError when another rank failed; StateError when the boxes overlap or leave
        holes; LateRanksError.
    """
    words = "" if problem is None else str(problem) or type(problem).__name__
    document = {
        "error": words,
        "may_pass": problem is not None and may_pass(problem),
        "held": [chunk_to_json(chunk) for chunk in offer.boxes],
        "buffers": [[position, digest] for position, digest in offer.buffers.items()],
        "aliases": dict(offer.aliases),
        "on_device": offer.on_device,
        "stateless": sorted(offer.stateless),
    }
    answers = None
    whole = Plan([])
    try:
        offers = channel.gather(f"{key}/held", canonical_bytes(document), timeout_secs, what=what)
        if offers is not None:
            answers, whole = _answers(offers, compared)
    except Exception as error:
        if channel.rank == 0:
            cause = f"rank 0: {type(error).__name__}: {error}"
            kind = "passing" if may_pass(error) else "peer"
            channel.scatter(f"{key}/plan", _refusals(channel.world_size, cause, kind), timeout_secs)
        raise
    raw = channel.scatter(f"{key}/plan", answers, timeout_secs + VERDICT_GRACE_SECS)
    if problem is not None:
        raise problem
    answer: Mapping[str, Any] = parse_canonical(raw, what="the save plan")
    if answer["error"]:
        if answer["kind"] == "state":
            raise StateError(answer["error"])
        raise PeerFailedError(answer["error"], may_pass=answer["kind"] == "passing")
    parts = [Part(p, dim, start, length, _chunk(chunk)) for p, dim, start, length, chunk in answer["parts"]]
    watched = [
        Watched(group, tuple(positions), frozenset(fresh)) for group, positions, fresh in answer["watched"]
    ]
    return Plan(parts, watched, answer["on_device"], whole.tensors, whole.aliases, whole.groups)


def _answers(raws: list[bytes], compared: Compared | None) -> tuple[list[bytes], Plan]:
    """Rank 0's answer to each rank, and the part of the plan that rank 0 keeps."""
    documents = [parse_canonical(raw, what="an offer") for raw in raws]
    errors = [f"rank {rank}: {doc['error']}" for rank, doc in enumerate(documents) if doc["error"]]
    passing = all(doc["may_pass"] for doc in documents if doc["error"])
    kind, plans = "passing" if passing else "peer", None
    if not errors:
        offers = [_offer(document) for document in documents]
        shared = shared_boxes(offers, compared.differing if compared else ())
        try:
            _check_state(offers)
            plans = divide([offer.boxes for offer in offers], shared)
        except StateError as error:
            errors, kind = [str(error)], "state"
    if plans is None:
        return _refusals(len(raws), "; ".join(errors), kind), Plan([])
    groups: list[Group] = []
    if compared is not None:
        groups = groups_to_compare(shared)
        compared.differing |= {box.chunk.name for box in shared.values() if box.kept}
    answers = [
        {
            "error": "",
            "kind": "",
            "parts": [[p.box, p.dim, p.start, p.length, chunk_to_json(p.chunk)] for p in parts],
            "watched": _watched(rank, groups, compared or Compared()),
            "on_device": any(offer.on_device for offer in offers),
        }
        for rank, parts in enumerate(plans)
    ]
    chunks = [*(c for offer in offers for c in offer.boxes), *(p.chunk for parts in plans for p in parts)]
    tensors = {chunk.name: TensorInfo(chunk.dtype, chunk.shape) for chunk in chunks}
    whole = Plan([], tensors=tensors, aliases=all_aliases(offers), groups=groups)
    return [canonical_bytes(answer) for answer in answers], whole


def _check_state(offers: Sequence[Offer]) -> None:
    lines = one_sided_state(offers)
    if lines:
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise StateError(
            f"optimizer state differs between ranks: {'; '.join(lines[:_SHOWN])}{more}. Step the optimizer "
            "in the same way on all ranks: it makes no state for a parameter without a gradient. If an "
            "optimizer belongs to one rank, declare its state key in per_rank"
        )


def fresh_of(group: Group, compared: Compared) -> frozenset[int]:
    """The boxes of a group that were never compared whole."""
    return frozenset(
        number for number, box in enumerate(group.boxes) if (box.chunk, group.ranks) not in compared.boxes
    )


def _watched(rank: int, groups: Sequence[Group], compared: Compared) -> list[list[Any]]:
    return [
        [
            number,
            [box.places[group.ranks.index(rank)][1] for box in group.boxes],
            sorted(fresh_of(group, compared)),
        ]
        for number, group in enumerate(groups)
        if rank in group.ranks
    ]


def _refusals(world_size: int, error: str, kind: str) -> list[bytes]:
    """The same answer to every rank: no plan."""
    return [canonical_bytes({"error": error, "kind": kind, "parts": [], "watched": []})] * world_size


def _offer(document: Mapping[str, Any]) -> Offer:
    return Offer(
        [_chunk(chunk) for chunk in document["held"]],
        dict(document["buffers"]),
        document["aliases"],
        document["on_device"],
        document["stateless"],
    )


def _chunk(value: list[Any]) -> Chunk:
    name, dtype, shape, offsets, sizes = value
    return Chunk(name, dtype, tuple(shape), tuple(offsets), tuple(sizes))
