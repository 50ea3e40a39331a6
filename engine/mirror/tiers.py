"""Two directories seen as one: each checkpoint once, as the copy that a restore would read. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.directory.listing import Listed

Tier = Literal["local", "mirror"]


@dataclass(frozen=True, slots=True)
class Tiers:
    """Every checkpoint of both in `listed`, by sequence; `from_mirror`: ids whose copy is the mirror's."""

    listed: tuple[Listed, ...]
    from_mirror: frozenset[str] = frozenset()


def both_tiers(local: Iterable[Listed], mirror: Iterable[Listed]) -> Tiers:
    """Of two copies the local one, which is nearer; one that is whole before any that is not."""
    mine, theirs = ({item.id: item for item in tier} for tier in (local, mirror))
    chosen = {id: _nearer(mine.get(id), theirs.get(id)) for id in {**mine, **theirs}}
    listed = sorted((item for item, _ in chosen.values()), key=_order)
    return Tiers(tuple(listed), frozenset(id for id, (_, tier) in chosen.items() if tier == "mirror"))


def _nearer(local: Listed | None, mirror: Listed | None) -> tuple[Listed, Tier]:
    if local is None:
        assert mirror is not None
        return mirror, "mirror"
    if mirror is not None and mirror.status == "committed" and local.status != "committed":
        return mirror, "mirror"
    return local, "local"


def _order(item: Listed) -> tuple[int, int, str]:
    """As `list_checkpoints` has it: by sequence, those without a readable manifest last."""
    if item.record is not None:
        return 0, item.record.sequence, item.id
    return (1 if item.status == "damaged" else 2), 0, item.id
