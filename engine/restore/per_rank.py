"""Modules and optimizers that are declared per rank: the checkpoint with this rank's own under live names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from engine.errors import StateError
from engine.format.manifest import Manifest
from engine.state.captured import PER_RANK_PREFIX
from engine.state.per_rank import OwnNames, with_names


def own_view(
    manifest: Manifest,
    locals_: Sequence[Mapping[str, Any]],
    keys: AbstractSet[str],
    *,
    rank: int,
    world_size: int,
) -> Manifest:
    """The manifest with this rank's own of `keys` in place of all ranks' own. Pure.

    Raises: StateError at another world size than the saved one: nobody knows whose is whose then.
    """
    if not keys:
        return manifest
    if manifest.world_size != world_size:
        raise StateError(
            f"{', '.join(sorted(keys))}: saved per rank by {manifest.world_size} ranks. Modules and "
            f"optimizers in per_rank cannot be restored on {world_size}: resume with the saved world size, "
            f"or leave them out with exclude={tuple(f'{key}.*' for key in sorted(keys))}"
        )
    names = OwnNames(rank, keys)
    prefixes = tuple(f"{PER_RANK_PREFIX}.{other:05d}.{key}." for other in range(world_size) for key in keys)

    def seen(saved: Mapping[str, Any]) -> dict[str, Any]:
        live = {names.live(name): value for name, value in saved.items()}
        return {name: value for name, value in live.items() if not name.startswith(prefixes)}

    aliases = {alias: names.live(name) for alias, name in seen(manifest.aliases).items()}
    own = {key: with_names(locals_[rank][key], names.live) for key in keys if key in locals_[rank]}
    return replace(
        manifest,
        tensors=seen(manifest.tensors),
        aliases={alias: name for alias, name in aliases.items() if not name.startswith(prefixes)},
        objects={**manifest.objects, **own},
    )
