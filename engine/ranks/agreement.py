"""One rank's result or error becomes every rank's, so that all go on or all stop, for the same reason."""

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
"""How much longer than rank 0 waits for late ranks the others wait for its word about them."""

LATE_VERDICT_SECS = 5.0
"""How long rank 0 stays for the others to read that some of them are late: these will not read it."""


def rank0_decides(channel: Channel, key: str, work: Callable[[], Any], timeout_secs: float) -> Any:
    """Run `work` at rank 0 and give its JSON result to every rank; its error is raised on every rank.

    Rank 0 does not wait for the others when all went well: what they do next does.

    Raises: what `work` raised, in the same class if it is Holdfast's own; CoordinationError.
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
        # Not longer than for the call itself: rank 0 may be alone in it.
        patience = min(VERDICT_GRACE_SECS, timeout_secs)
        _acknowledge(channel, key, patience, without=getattr(error, "ranks", ()))
        raise
    channel.broadcast(key, canonical_bytes(document), timeout_secs)
    return document["value"]


def all_agree(
    channel: Channel, key: str, problem: Exception | None, timeout_secs: float, *, what: str = ""
) -> None:
    """Return when no rank has a problem; otherwise raise on every rank.

    The problem of the lowest rank that has one is everybody's, in the same class if it is Holdfast's own,
    else a PeerFailedError: ranks that raised different kinds would go different ways and wait for each
    other. A LateRanksError reaches every rank, too. `what`: the call that they are in, for its message.
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
        its_own = answer["error"].get("rank") == channel.rank
        if problem is not None and (its_own or type(problem) is type(common)):
            raise problem from None
        raise common from problem


def all_come(channel: Channel, call: Call, timeout_secs: float) -> None:
    """Return when every rank has come to the call; what follows may have collectives, where one alone hangs.

    Raises: LateRanksError, on every rank, naming those that have not; the call is over then.
    """
    try:
        all_agree(channel, f"{call.key}/here", None, timeout_secs, what=str(call.request))
    except CoordinationError:
        end_call(channel, call)
        raise


def all_make(channel: Channel, key: str, work: Callable[[], T], timeout_secs: float, *, what: str) -> T:
    """Each rank's own result of `work`, when all of them have one; raises as `all_agree` otherwise.

    What a rank has made by then is its own to clean up.
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
    """Keep rank 0, whose process hosts the store, until every rank has read `key`; then forget the key.

    Nobody waits for the ranks in `without`: the key stays for them, should they come.

    A rank that does not come, or a store that is gone, changes nothing about what was decided.
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
    """Begin a call of all ranks on which rank 0 has nothing to decide.

    `together`: rank 0's answer to whether every rank has to have come before any of them looks at its state.
    Raises: as `Calls.join` and `all_come`.
    """
    first = calls.channel.rank == 0
    call = calls.decide(request, {"together": together}) if first else calls.join(request)
    if call.term("together"):
        all_come(calls.channel, call, calls.timeout_secs)
    return call
