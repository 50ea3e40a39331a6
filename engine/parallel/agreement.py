"""One rank's result or error becomes every rank's, so that all go on or all stop, for the same reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine import errors
from engine.errors import HoldfastError, PeerFailedError
from engine.format.json import canonical_bytes, parse_canonical
from engine.parallel.coordination import Channel


def rank0_decides(channel: Channel, key: str, work: Callable[[], Any], timeout_secs: float) -> Any:
    """Run `work` at rank 0 and give its JSON result to every rank; its error is raised on every rank.

    Raises: what `work` raised, in the same class if it is Holdfast's own; CoordinationError.
    """
    if channel.rank != 0:
        return _open(channel.broadcast(key, None, timeout_secs))
    try:
        document = {"value": work(), "error": None}
    except Exception as error:
        channel.broadcast(key, canonical_bytes({"value": None, "error": _describe(error)}), timeout_secs)
        raise
    channel.broadcast(key, canonical_bytes(document), timeout_secs)
    return document["value"]


def all_agree(channel: Channel, key: str, problem: Exception | None, timeout_secs: float) -> None:
    """Return when no rank has a problem; otherwise raise on every rank.

    A rank with a problem raises its own; the others raise that of the lowest rank that has one, in the same
    class if it is Holdfast's own, else a PeerFailedError. Raises LateRanksError, too.
    """
    note = canonical_bytes({"value": None, "error": problem and _describe(problem)})
    notes = channel.gather(f"{key}/all", note, timeout_secs)
    verdict = b""
    if notes is not None:
        documents = [(rank, parse_canonical(raw, what="a note")["error"]) for rank, raw in enumerate(notes)]
        failed = [(rank, error) for rank, error in documents if error is not None]
        first = (
            failed[0][1] | {"rank": failed[0][0], "ranks": [rank for rank, _ in failed]} if failed else None
        )
        verdict = canonical_bytes({"value": None, "error": first})
    raw = channel.broadcast(f"{key}/verdict", verdict, timeout_secs)
    if problem is not None:
        raise problem
    _open(raw)


def _describe(error: Exception) -> dict[str, Any]:
    return {"kind": type(error).__name__, "message": str(error) or type(error).__name__}


def _open(raw: bytes) -> Any:
    document = parse_canonical(raw, what="an agreement")
    error = document["error"]
    if error is None:
        return document["value"]
    kind = getattr(errors, error["kind"], None)
    if isinstance(kind, type) and issubclass(kind, HoldfastError):
        raise kind(error["message"])
    rank = error.get("rank", 0)
    raise PeerFailedError(f"rank {rank} failed: {error['kind']}: {error['message']}")
