"""What a checkpoint holds that this rank has no place for, but another rank has: pipeline stages, experts."""

from __future__ import annotations

from collections.abc import Sequence

from engine.format.json import canonical_bytes, parse_canonical
from engine.ranks.agreement import VERDICT_GRACE_SECS, rank0_decides
from engine.ranks.coordination import Channel


def unexpected_on_all(
    channel: Channel, key: str, unexpected: Sequence[str] | None, timeout_secs: float, what: str
) -> frozenset[str]:
    """The names that every rank has no place for. Every rank calls it, also one that has failed: with None.

    Raises: LateRanksError, on every rank, naming those that did not come to `what`; CoordinationError.
    """
    note = canonical_bytes(None if unexpected is None else list(unexpected))
    if channel.rank != 0:
        channel.gather(f"{key}/unexpected", note, 0)

    def ask() -> list[str]:
        raws = channel.gather(f"{key}/unexpected", note, timeout_secs, what=what)
        assert raws is not None, "only rank 0 asks"
        lists = [parse_canonical(raw, what="a list of names") for raw in raws]
        return sorted(nowhere([names for names in lists if names is not None]))

    return frozenset(rank0_decides(channel, f"{key}/nowhere", ask, timeout_secs + VERDICT_GRACE_SECS))


def nowhere(lists: Sequence[Sequence[str]]) -> set[str]:
    """The names that are in all of the lists. Pure."""
    return set.intersection(*map(set, lists)) if lists else set()
