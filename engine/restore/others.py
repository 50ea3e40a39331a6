"""What a checkpoint holds that this rank has no place for, but another rank has: pipeline stages, experts."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import CoordinationError
from engine.format.json import canonical_bytes, parse_canonical
from engine.parallel.agreement import VERDICT_GRACE_SECS
from engine.parallel.coordination import Channel


def unexpected_on_all(
    channel: Channel, key: str, unexpected: Sequence[str] | None, timeout_secs: float
) -> frozenset[str]:
    """The names that every rank has no place for. Every rank calls it, also one that has failed: with None.

    Raises: LateRanksError; CoordinationError.
    """
    try:
        names = None if unexpected is None else list(unexpected)
        raws = channel.gather(f"{key}/unexpected", canonical_bytes(names), timeout_secs)
    except CoordinationError:
        channel.broadcast(f"{key}/nowhere", canonical_bytes([]), 0)
        raise
    found = None
    if raws is not None:
        lists = [parse_canonical(raw, what="a list of names") for raw in raws]
        found = canonical_bytes(sorted(nowhere([names for names in lists if names is not None])))
    raw = channel.broadcast(f"{key}/nowhere", found, timeout_secs + VERDICT_GRACE_SECS)
    return frozenset(parse_canonical(raw, what="a list of names"))


def nowhere(lists: Sequence[Sequence[str]]) -> set[str]:
    """The names that are in all of the lists. Pure."""
    return set.intersection(*map(set, lists)) if lists else set()
