"""A rank that has missed a save answers in its place, so that rank 0 need not wait for the deadline."""

from __future__ import annotations

import functools
from collections.abc import Callable

from engine.errors import CoordinationError
from engine.format.json import canonical_bytes
from engine.ranks.calls import SAVE, Call
from engine.ranks.coordination import Channel
from engine.save.receipt import Receipt


def answer_on(channel: Channel) -> Callable[[Call, str], None]:
    """`tell_rank_0` on that channel. It holds the channel alone: a Saver in it would be a reference cycle."""
    return functools.partial(tell_rank_0, channel)


def tell_rank_0(channel: Channel, call: Call, words: str) -> None:
    """Answer a call of rank 0's that this rank did not make, with `words` as the reason."""
    if call.request.kind != SAVE or call.term("action") in ("skip", "raise"):
        return
    if call.term("replan"):
        offer = {"error": words, "may_pass": True, "held": []}
        channel.gather(f"{call.key}/plan/held", canonical_bytes(offer), 0)
    attempt = str(call.term("attempt") or "")
    receipt = Receipt(channel.rank, attempt, error=f"{CoordinationError.__name__}: {words}")
    channel.gather(f"{call.key}/receipt", receipt.to_bytes(), 0)
    channel.gather(f"{call.key}/ack", b"1", 0)
