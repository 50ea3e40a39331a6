"""Agree on who writes what: once per structure, over the store, without a collective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import PeerFailedError, StateError
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.layout import Chunk
from engine.format.manifest import TensorInfo
from engine.parallel.agreement import VERDICT_GRACE_SECS
from engine.parallel.coordination import Channel
from engine.snapshot.divide import Part, divide
from engine.snapshot.snapshot import chunk_to_json


def agree_on_plan(
    channel: Channel,
    key: str,
    held: list[Chunk],
    problem: Exception | None,
    timeout_secs: float,
) -> tuple[list[Part], dict[str, TensorInfo]]:
    """Exchange what every rank holds and get back what this one writes.

    Every rank calls it for the same save; one that already failed still does, with its `problem`, so that
    nobody waits for it. Returns: this rank's parts; at rank 0 also every tensor's dtype and global shape.
    Raises: `problem`; PeerFailedError when another rank failed; StateError when the boxes do not fit
        together; LateRanksError.
    """
    words = "" if problem is None else str(problem) or type(problem).__name__
    offer = {"error": words, "held": [chunk_to_json(chunk) for chunk in held]}
    answers = None
    tensors: dict[str, TensorInfo] = {}
    try:
        offers = channel.gather(f"{key}/held", canonical_bytes(offer), timeout_secs)
        if offers is not None:
            answers, tensors = _answers(offers)
    except Exception as error:
        if channel.rank == 0:
            cause = f"rank 0: {type(error).__name__}: {error}"
            channel.scatter(f"{key}/plan", _refusals(channel.world_size, cause, "peer"), timeout_secs)
        raise
    raw = channel.scatter(f"{key}/plan", answers, timeout_secs + VERDICT_GRACE_SECS)
    if problem is not None:
        raise problem
    answer: Mapping[str, Any] = parse_canonical(raw, what="the save plan")
    if answer["error"]:
        raise (StateError if answer["kind"] == "state" else PeerFailedError)(answer["error"])
    parts = [Part(p, dim, start, length, _chunk(chunk)) for p, dim, start, length, chunk in answer["parts"]]
    return parts, tensors


def _answers(offers: list[bytes]) -> tuple[list[bytes], dict[str, TensorInfo]]:
    """Rank 0's answer to each rank, and what the manifest says of each tensor."""
    documents = [parse_canonical(raw, what="an offer") for raw in offers]
    errors = [f"rank {rank}: {doc['error']}" for rank, doc in enumerate(documents) if doc["error"]]
    kind, plans = "peer", None
    if not errors:
        chunks = [[_chunk(chunk) for chunk in document["held"]] for document in documents]
        try:
            plans = divide(chunks)
        except StateError as error:
            errors, kind = [str(error)], "state"
    if plans is None:
        return _refusals(len(offers), "; ".join(errors), kind), {}
    tensors = {chunk.name: TensorInfo(chunk.dtype, chunk.shape) for held in chunks for chunk in held}
    answers = [
        {
            "error": "",
            "kind": "",
            "parts": [[p.held, p.dim, p.start, p.length, chunk_to_json(p.chunk)] for p in parts],
        }
        for parts in plans
    ]
    return [canonical_bytes(answer) for answer in answers], tensors


def _refusals(world_size: int, error: str, kind: str) -> list[bytes]:
    """The same answer to every rank: there is no plan."""
    return [canonical_bytes({"error": error, "kind": kind, "parts": []})] * world_size


def _chunk(value: list[Any]) -> Chunk:
    name, dtype, shape, offsets, sizes = value
    return Chunk(name, dtype, tuple(shape), tuple(offsets), tuple(sizes))
