"""Merge the listings of two directories: each checkpoint once, as the copy that a restore reads. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from engine.directory.listing import Listed

Tier = Literal["local", "mirror"]


@dataclass(frozen=True, slots=True)
class Tiers:
    """`listed`: the checkpoints of both tiers, by sequence. `from_mirror`: ids taken from the mirror."""

    listed: tuple[Listed, ...]
    from_mirror: frozenset[str] = frozenset()


def both_tiers(local: Iterable[Listed], mirror: Iterable[Listed]) -> Tiers:
    """Prefer the local copy, which is faster to read, unless only the mirror's is committed."""
    local_items, mirror_items = ({item.id: item for item in tier} for tier in (local, mirror))
    ids = {**local_items, **mirror_items}
    chosen = {id: _prefer(local_items.get(id), mirror_items.get(id)) for id in ids}
    listed = sorted((item for item, _ in chosen.values()), key=_order)
    return Tiers(tuple(listed), frozenset(id for id, (_, tier) in chosen.items() if tier == "mirror"))


def _prefer(local: Listed | None, mirror: Listed | None) -> tuple[Listed, Tier]:
    if local is None:
        assert mirror is not None
        return mirror, "mirror"
    if mirror is not None and mirror.status == "committed" and local.status != "committed":
        return mirror, "mirror"
    return local, "local"


def _order(item: Listed) -> tuple[int, int, str]:
    """The order of `list_checkpoints`: by sequence, those without a readable manifest last."""
    if item.record is not None:
        return 0, item.record.sequence, item.id
    return (1 if item.status == "damaged" else 2), 0, item.id
