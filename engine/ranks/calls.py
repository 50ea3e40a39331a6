"""Matches the ranks' calls: rank 0 numbers its calls, and every other rank finds the one that it is making.

Only rank 0 numbers calls. A rank that missed a call, or made one that rank 0 did not make, learns so within
the deadline and finds the next call that all ranks make.

    rank 0       `begin`: it has reached the call but must wait before it can decide; `decide`: its decision;
                 `end_call`: the call failed, and late ranks skip it
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

ALL_RANKS = "every rank must make the same calls in the same order"


@dataclass(frozen=True, slots=True)
class Request:
    """A call that every rank makes. `subject`: the step of a save, the selector of a restore."""

    kind: str
    subject: int | str = ""

    def __str__(self) -> str:
        if self.kind == SAVE:
            return f"the save of step {self.subject}"
        return f"the restore of {self.subject!r}" if self.kind == RESTORE else f"{self.kind}()"

    def is_past(self, other: Request) -> bool:
        """Whether a rank in this call has certainly passed `other`."""
        steps = (self.subject, other.subject)
        if self.kind != SAVE or other.kind != SAVE:
            return False
        return isinstance(steps[0], int) and isinstance(steps[1], int) and steps[0] > steps[1]


@dataclass(frozen=True, slots=True)
class Call:
    """One call as rank 0 has announced it. `terms` is its decision, or None while it cannot decide yet."""

    number: int
    request: Request
    terms: Mapping[str, Any] | None
    over: bool = False

    @property
    def key(self) -> str:
        """Prefix of this call's keys in the store."""
        return f"{self.request.kind}/{self.number}"

    def term(self, name: str) -> Any:
        """One of the terms, or None."""
        return (self.terms or {}).get(name)

    def to_bytes(self) -> bytes:
        """Canonical JSON of everything but the number."""
        terms = None if self.terms is None else dict(self.terms)
        document = {"kind": self.request.kind, "of": self.request.subject, "over": self.over, "terms": terms}
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
        patience_secs: how long rank 0 may take to decide after it has reached a call.
        on_missed: called for every call that rank 0 made without this rank, with the reason in words.
    """

    channel: Channel
    timeout_secs: float
    patience_secs: float
    on_missed: Callable[[Call, str], None] = lambda call, words: None
    clock: Callable[[], float] = time.monotonic
    _number: int = 0
    """On rank 0 the newest call; elsewhere the newest call that this rank has joined or missed."""
    _begun: Call | None = None
    _announced: list[str] = field(default_factory=list)
    """Keys that some rank may not have read yet."""

    def begin(self, request: Request) -> None:
        """Announce that rank 0 has reached the call but must wait before it can decide."""
        if self.channel.world_size > 1:
            self._begun = self._announce(request, None)

    def decide(self, request: Request, terms: Mapping[str, Any]) -> Call:
        """Announce rank 0's decision on the call that it is making."""
        if self._begun is not None and self._begun.request != request:
            self.cancel(f"it has moved on to {request}")
        begun, self._begun = self._begun, None
        if begun is None:
            return self._announce(request, terms)
        key = _terms_key(begun.number)
        self.channel.broadcast(key, canonical_bytes(dict(terms)), 0)
        self._announced.append(key)
        return Call(begun.number, request, terms)

    def cancel(self, why: str) -> None:
        """Abandon the call that rank 0 has begun, if there is one."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self.channel.broadcast(_terms_key(begun.number), canonical_bytes({_CANCELLED: why}), 0)
            self._announced.append(_terms_key(begun.number))
            end_call(self.channel, begun)

    def join(self, request: Request) -> Call:
        """Wait for rank 0's decision on the call that this rank is making.

        Raises: LateRanksError when rank 0 does not reach the call in time; CoordinationError at once when
            rank 0 has passed or abandoned it.
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
                # Do not advance past that call: this rank may still reach it.
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
        """The number of announcements so far: for `forget`, once every rank has read them."""
        return len(self._announced)

    def forget(self, upto: int) -> None:
        """Delete the first `upto` announcements from the store."""
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
        terms = parse_canonical(raw, what="rank 0's decision")
        if _CANCELLED in terms:
            raise CoordinationError(f"rank 0 abandoned {call.request}: {terms[_CANCELLED]}")
        return Call(call.number, call.request, terms)

    def _alone(self, request: Request, missed: Call | None) -> LateRanksError:
        last = "" if missed is None else f" (it was last at {missed.request})"
        return LateRanksError(
            f"rank 0 did not reach {request} within {round(self.timeout_secs, 1):g} s{last}, but rank "
            f"{self.channel.rank} did: {ALL_RANKS}. If they do, look at rank 0's log for a hang or a crash"
        )


def end_call(channel: Channel, call: Call) -> None:
    """Mark rank 0's failed call as over, so that ranks that have not reached it skip it. For any thread."""
    if channel.rank == 0:
        over = Call(call.number, call.request, call.terms, over=True)
        channel.broadcast(_key(call.number), over.to_bytes(), 0)


def _key(number: int) -> str:
    return f"call/{number}"


def _terms_key(number: int) -> str:
    return f"call/{number}/terms"
