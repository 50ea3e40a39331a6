"""Which call all ranks are in: rank 0 numbers its calls, every other rank finds the one that it is making.

Nothing is counted per rank. A rank that missed a call, or made one that rank 0 did not make, learns of it
within the deadline, and finds the next call that all ranks make.

    rank 0       `begin`: it has reached the call, but must wait for something first; `decide`: its decision;
                 `end_call`: a call that failed is over, late ranks go on to the next one
    other ranks  `join`: wait for rank 0's decision on the call that they are making
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import CoordinationError, LateRanksError
from engine.format.json import canonical_bytes, parse_canonical
from engine.ranks.coordination import Channel

SAVE, PREPARE, RESTORE = "save", "prepare", "restore"

_CANCELLED = "cancelled"

ALL_RANKS = "every rank has to make the same calls in the same order"


@dataclass(frozen=True, slots=True)
class Request:
    """A call that every rank makes. `of`: the step of a save, the selector of a restore."""

    kind: str
    of: int | str = ""

    def __str__(self) -> str:
        if self.kind == SAVE:
            return f"the save of step {self.of}"
        return f"the restore of {self.of!r}" if self.kind == RESTORE else f"{self.kind}()"

    def is_past(self, other: Request) -> bool:
        """Whether a rank that is here has `other` behind it for sure."""
        steps = (self.of, other.of)
        if self.kind != SAVE or other.kind != SAVE:
            return False
        return isinstance(steps[0], int) and isinstance(steps[1], int) and steps[0] > steps[1]


@dataclass(frozen=True, slots=True)
class Call:
    """One call as rank 0 has announced it. `terms` is its word on it, or None while it has to wait."""

    number: int
    request: Request
    terms: Mapping[str, Any] | None
    over: bool = False

    @property
    def key(self) -> str:
        """Prefix of the call's own keys in the store."""
        return f"{self.request.kind}/{self.number}"

    def term(self, name: str) -> Any:
        """One of the terms, None where there is none."""
        return (self.terms or {}).get(name)

    def to_bytes(self) -> bytes:
        """Canonical JSON, all but the number."""
        terms = None if self.terms is None else dict(self.terms)
        document = {"kind": self.request.kind, "of": self.request.of, "over": self.over, "terms": terms}
        return canonical_bytes(document)

    @classmethod
    def from_bytes(cls, number: int, raw: bytes) -> Call:
        """The inverse of `to_bytes`."""
        document = parse_canonical(raw, what="rank 0's call")
        return cls(number, Request(document["kind"], document["of"]), document["terms"], document["over"])


@dataclass(slots=True)
class Calls:
    """The calls of one Checkpointer, as this rank sees them. Used from the training thread.

    Args:
        patience_secs: how long rank 0 may have to wait, once it has come, before it can give its word.
        on_missed: told of every call that rank 0 made without this rank, with the words for it.
    """

    channel: Channel
    timeout_secs: float
    patience_secs: float
    on_missed: Callable[[Call, str], None] = lambda call, words: None
    clock: Callable[[], float] = time.monotonic
    _number: int = 0
    """The newest call at rank 0; elsewhere the newest one that this rank has taken part in or missed."""
    _begun: Call | None = None
    _announced: list[str] = field(default_factory=list)
    """Keys that some rank may not have read yet."""

    def begin(self, request: Request) -> None:
        """Rank 0 has come to the call and has to wait before it can give its word."""
        if self.channel.world_size > 1:
            self._begun = self._announce(request, None)

    def decide(self, request: Request, terms: Mapping[str, Any]) -> Call:
        """Give rank 0's word on the call that it is making."""
        if self._begun is not None and self._begun.request != request:
            self.cancel(f"it has gone on to {request}")
        begun, self._begun = self._begun, None
        if begun is None:
            return self._announce(request, terms)
        key = _terms_key(begun.number)
        self.channel.broadcast(key, canonical_bytes(dict(terms)), 0)
        self._announced.append(key)
        return Call(begun.number, request, terms)

    def cancel(self, why: str) -> None:
        """Rank 0 makes nothing of the call that it has begun, if there is one."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self.channel.broadcast(_terms_key(begun.number), canonical_bytes({_CANCELLED: why}), 0)
            self._announced.append(_terms_key(begun.number))
            end_call(self.channel, begun)

    def join(self, request: Request) -> Call:
        """Wait for rank 0's word on the call that this rank is making.

        Raises: LateRanksError when rank 0 does not reach it in time; CoordinationError at once when rank 0
            is past it, or has given it up.
        """
        deadline = self.clock() + self.timeout_secs
        missed: Call | None = None
        while True:
            number = self._number + 1
            try:
                raw = self.channel.broadcast(_key(number), None, max(0.001, deadline - self.clock()))
            except LateRanksError as error:
                raise self._alone(request, missed) from error
            call = Call.from_bytes(number, raw)
            if call.request != request and not call.over and call.request.is_past(request):
                # Not counted as dealt with: this rank may yet come to that call.
                raise CoordinationError(
                    f"rank 0 is at {call.request}, rank {self.channel.rank} at {request}: {ALL_RANKS}"
                )
            self._number = number
            if call.request == request and not call.over:
                return self._with_terms(call)
            if not call.over:
                self.on_missed(call, f"it did not reach {call.request}: it is at {request}; {ALL_RANKS}")
            missed = call

    @property
    def deciding(self) -> int:
        """The number of the call that rank 0 decides next."""
        return self._begun.number if self._begun else self._number + 1

    def mark(self) -> int:
        """How much has been announced: for `forget`, once it is known that every rank has read so far."""
        return len(self._announced)

    def forget(self, upto: int) -> None:
        """Delete the first so many announcements from the store."""
        self.channel.forget(self._announced[:upto])
        del self._announced[:upto]

    def _announce(self, request: Request, terms: Mapping[str, Any] | None) -> Call:
        self._number += 1
        call = Call(self._number, request, terms)
        if self.channel.world_size > 1:
            self.channel.broadcast(_key(call.number), call.to_bytes(), 0)
            self._announced.append(_key(call.number))
        return call

    def _with_terms(self, call: Call) -> Call:
        if call.terms is not None:
            return call
        raw = self.channel.broadcast(_terms_key(call.number), None, self.patience_secs + self.timeout_secs)
        terms = parse_canonical(raw, what="rank 0's word")
        if _CANCELLED in terms:
            raise CoordinationError(f"rank 0 gave up {call.request}: {terms[_CANCELLED]}")
        return Call(call.number, call.request, terms)

    def _alone(self, request: Request, missed: Call | None) -> LateRanksError:
        last = "" if missed is None else f" (it was last at {missed.request})"
        return LateRanksError(
            f"rank 0 did not reach {request} within {round(self.timeout_secs, 1):g} s{last}, but rank "
            f"{self.channel.rank} did: {ALL_RANKS}. If they do, look at rank 0's log for a hang or a crash"
        )


def end_call(channel: Channel, call: Call) -> None:
    """Rank 0's call failed: ranks that have not reached it no longer need to. Called from any thread."""
    if channel.rank == 0:
        over = Call(call.number, call.request, call.terms, over=True)
        channel.broadcast(_key(call.number), over.to_bytes(), 0)


def _key(number: int) -> str:
    return f"call/{number}"


def _terms_key(number: int) -> str:
    return f"call/{number}/terms"
