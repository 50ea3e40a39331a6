"""The two dimensions of data parallelism, as a value and as a DeviceMesh.

`MeshShape` needs no torch, so that launchers can check the arithmetic before any rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

REPLICATE = "dp_replicate"
SHARD = "dp_shard"
DIM_NAMES = (REPLICATE, SHARD)


@dataclass(frozen=True, slots=True)
class MeshShape:
    """`dp_replicate` whole copies of the model, each sharded over `dp_shard` neighbouring ranks.

    Raises:
        ConfigError: a size below 1.
    """

    dp_replicate: int
    dp_shard: int

    def __post_init__(self) -> None:
        for name, size in zip(DIM_NAMES, self.shape, strict=True):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {size!r}")

    @classmethod
    def split(cls, world_size: int, dp_replicate: int = 1) -> MeshShape:
        """Divide `world_size` ranks into `dp_replicate` replicas.

        Raises:
            ConfigError: the ranks do not divide evenly; the message shows the arithmetic.
        """
        replicas = cls(dp_replicate, 1).dp_replicate
        if world_size < 1:
            raise ConfigError(f"the world size must be at least 1, not {world_size}")
        if world_size % replicas:
            each, over = divmod(world_size, replicas)
            fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
            raise ConfigError(
                f"dp_replicate {replicas} does not divide {world_size} ranks: "
                f"{world_size} = {replicas} x {each} + {over}; use {fitting}"
            )
        return cls(replicas, world_size // replicas)

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes in the order of `DIM_NAMES`."""
        return (self.dp_replicate, self.dp_shard)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard


def build_mesh(device_type: str, world_size: int, dp_replicate: int = 1) -> DeviceMesh | None:
    """Return the mesh ("dp_replicate", "dp_shard") over all ranks, or None for a single rank.

    Collective: every rank calls it, after `init_process_group`.

    Args:
        device_type: "cpu" or "cuda".
        world_size: number of ranks in the default process group.
        dp_replicate: whole copies of the model; 1 shards it over all ranks, `world_size` turns sharding off.

    Raises:
        ConfigError: `dp_replicate` does not divide `world_size`.
    """
    shape = MeshShape.split(world_size, dp_replicate)
    if shape.world_size == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, shape.shape, mesh_dim_names=DIM_NAMES)


def shape_of(mesh: DeviceMesh | None) -> MeshShape:
    """The MeshShape of a mesh from `build_mesh`."""
    if mesh is None:
        return MeshShape(1, 1)
    return MeshShape(mesh[REPLICATE].size(), mesh[SHARD].size())
