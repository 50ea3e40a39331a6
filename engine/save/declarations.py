"""Checks that all ranks make a Checkpointer alike: the kind of each state key, and `read_only`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import ConfigError
from engine.format.json import canonical_bytes, parse_canonical
from engine.ranks.agreement import VERDICT_GRACE_SECS, rank0_decides
from engine.ranks.coordination import Channel

SHARED, PER_RANK, RANK0 = "in neither per_rank nor rank0", "in per_rank", "in rank0"


def declarations(keys: Sequence[str], per_rank: Sequence[str], rank0: Sequence[str]) -> dict[str, str]:
    """How one rank declares each of its state keys."""
    return {key: PER_RANK if key in per_rank else RANK0 if key in rank0 else SHARED for key in keys}


def conflict(by_rank: Sequence[Mapping[str, str]]) -> str:
    """A sentence about the first key that the ranks declare differently; "" if there is none. Pure.

    Otherwise a checkpoint would mix values of both kinds, or lack a key of rank0 that rank 0 does not have.
    """
    for key in sorted({key for declared in by_rank for key in declared}):
        first, *others = [(rank, declared[key]) for rank, declared in enumerate(by_rank) if key in declared]
        for rank, kind in others:
            if kind != first[1]:
                return (
                    f"the ranks declare the state key {key!r} differently: rank {first[0]} has it "
                    f"{first[1]}, rank {rank} {kind}. Declare it alike on every rank that has it"
                )
        if first[1] == RANK0 and first[0] != 0:
            return (
                f"the state key {key!r} is in rank0 on rank {first[0]}, and rank 0 does not have it: nothing "
                "would be saved. Add it to the state of rank 0, or take it out of rank0"
            )
    return ""


def mixed_read_only(by_rank: Sequence[bool]) -> str:
    """A sentence if only some ranks are read-only; "" otherwise. Pure."""
    if len(set(by_rank)) == 1:
        return ""
    return (
        f"read_only is True on rank {by_rank.index(True)} and False on rank {by_rank.index(False)}: make the "
        "Checkpointer alike on every rank, or give the ranks that save a process_group of their own"
    )


def all_declare_alike(
    channel: Channel, declared: Mapping[str, str], timeout_secs: float, *, read_only: bool
) -> None:
    """Return if all ranks declare their keys and `read_only` alike. Raises ConfigError on every rank
    otherwise."""
    key, note = "start/declared", canonical_bytes({"keys": dict(declared), "read_only": read_only})

    def compare() -> None:
        notes = channel.gather(key, note, timeout_secs, what="the making of a Checkpointer")
        parsed = [parse_canonical(raw, what="declarations") for raw in notes or ()]
        found = mixed_read_only([each["read_only"] for each in parsed])
        found = found or conflict([each["keys"] for each in parsed])
        if found:
            raise ConfigError(found)

    if channel.rank != 0:
        channel.gather(key, note, timeout_secs)
    rank0_decides(channel, f"{key}/verdict", compare, timeout_secs + VERDICT_GRACE_SECS)
