"""Makes one rank's result or error every rank's, so that all continue or all stop, for the same reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from engine import errors
from engine.errors import CoordinationError, HoldfastError, LateRanksError, PeerFailedError
from engine.format.json import canonical_bytes, parse_canonical
from engine.ranks.calls import Call, Calls, Request, end_call
from engine.ranks.coordination import Channel

T = TypeVar("T")

VERDICT_GRACE_SECS = 30.0
"""Rank 0 waits for late ranks; the others wait this much longer for its verdict."""

LATE_VERDICT_SECS = 5.0
"""How long rank 0 waits for the others to read that some ranks are late. The late ones will not read it."""


def rank0_decides(channel: Channel, key: str, work: Callable[[], Any], timeout_secs: float) -> Any:
    """Run `work` on rank 0 and return its JSON result on every rank, or raise its error on every rank.

    After success rank 0 does not wait for the others; the next exchange does.

    Raises: the error of `work`, in the same class if it is Holdfast's own; CoordinationError.
    """
    if channel.rank != 0:
        answer = _parse(channel.broadcast(key, None, timeout_secs))
        if answer["error"] is not None:
            _acknowledge(channel, key, 0)
        return _open(answer)
    try:
        document = {"value": work(), "error": None}
    except Exception as error:
        channel.broadcast(key, canonical_bytes({"value": None, "error": _describe(error)}), timeout_secs)
        # No longer than for the call itself: rank 0 may be the only rank that made it.
        patience = min(VERDICT_GRACE_SECS, timeout_secs)
        _acknowledge(channel, key, patience, without=getattr(error, "ranks", ()))
        raise
    channel.broadcast(key, canonical_bytes(document), timeout_secs)
    return document["value"]


def all_agree(
    channel: Channel, key: str, problem: Exception | None, timeout_secs: float, *, what: str = ""
) -> None:
    """Return if no rank has a problem; otherwise raise on every rank.

    Every rank raises the problem of the lowest rank that has one: in the same class if it is Holdfast's own,
    else as a PeerFailedError. Ranks that raised different classes could diverge and wait for each other.
    A LateRanksError is raised on every rank, too. `what`: the call that the ranks are in, for its message.
    """
    note = canonical_bytes({"value": None, "error": problem and _describe(problem)})
    try:
        notes = channel.gather(f"{key}/all", note, timeout_secs, what=what)
    except LateRanksError as late:
        channel.broadcast(f"{key}/verdict", canonical_bytes({"value": None, "error": _describe(late)}), 0)
        _acknowledge(channel, f"{key}/verdict", LATE_VERDICT_SECS, without=late.ranks)
        raise
    verdict = b""
    if notes is not None:
        errors_by_rank = [parse_canonical(raw, what="a note")["error"] for raw in notes]
        first = next((error | {"rank": rank} for rank, error in enumerate(errors_by_rank) if error), None)
        verdict = canonical_bytes({"value": None, "error": first})
    answer = _parse(channel.broadcast(f"{key}/verdict", verdict, timeout_secs + VERDICT_GRACE_SECS))
    _acknowledge(channel, f"{key}/verdict", VERDICT_GRACE_SECS)
    try:
        _open(answer)
    except HoldfastError as common:
        own = answer["error"].get("rank") == channel.rank
        if problem is not None and (own or type(problem) is type(common)):
            raise problem from None
        raise common from problem


def all_arrive(channel: Channel, call: Call, timeout_secs: float) -> None:
    """Return when every rank has reached the call: collectives may follow, in which a lone rank would hang.

    Raises: LateRanksError, on every rank, naming those that have not; the call has then ended.
    """
    try:
        all_agree(channel, f"{call.key}/here", None, timeout_secs, what=str(call.request))
    except CoordinationError:
        end_call(channel, call)
        raise


def all_make(channel: Channel, key: str, work: Callable[[], T], timeout_secs: float, *, what: str) -> T:
    """Run `work` on every rank and return this rank's result if all succeed; otherwise raise as `all_agree`.

    Each rank must then clean up whatever its own `work` has made.
    """
    made: list[T] = []
    problem: Exception | None = None
    try:
        made.append(work())
    except Exception as error:
        problem = error
    all_agree(channel, key, problem, timeout_secs, what=what)
    return made[0]


def _acknowledge(channel: Channel, key: str, timeout_secs: float, *, without: tuple[int, ...] = ()) -> None:
    """Make rank 0, whose process hosts the store, wait until every rank has read `key`; then delete the key.

    Rank 0 does not wait for the ranks in `without`; the key stays for them in case they arrive.

    The decision stands even if a rank never arrives or the store is gone.
    """
    with contextlib.suppress(LateRanksError, CoordinationError):
        channel.gather(f"{key}/seen", b"1", timeout_secs, without=without)
        if channel.rank == 0 and not without:
            channel.forget([key])


def _describe(error: Exception) -> dict[str, Any]:
    return {"kind": type(error).__name__, "message": str(error) or type(error).__name__}


def _parse(raw: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = parse_canonical(raw, what="an agreement")
    return answer


def _open(answer: dict[str, Any]) -> Any:
    error = answer["error"]
    if error is None:
        return answer["value"]
    kind = getattr(errors, error["kind"], None)
    if isinstance(kind, type) and issubclass(kind, HoldfastError):
        raise kind(error["message"])
    rank = error.get("rank", 0)
    raise PeerFailedError(f"rank {rank} failed: {error['kind']}: {error['message']}")


def open_call(calls: Calls, request: Request, *, together: bool) -> Call:
    """Begin a call of all ranks that needs no decision by rank 0.

    `together`: whether every rank must reach the call before any of them looks at its state; rank 0's counts.
    Raises: as `Calls.join` and `all_arrive`.
    """
    terms = {"together": together}
    call = calls.decide(request, terms) if calls.channel.rank == 0 else calls.join(request)
    if call.term("together"):
        all_arrive(calls.channel, call, calls.timeout_secs)
    return call
