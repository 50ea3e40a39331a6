"""How ranks divide into replicas and shards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.run.mesh import MeshShape, build_mesh, shape_of


@pytest.mark.parametrize(
    ("world_size", "dp_replicate", "shape"),
    [(1, 1, (1, 1)), (4, 1, (1, 4)), (4, 2, (2, 2)), (6, 3, (3, 2)), (4, 4, (4, 1))],
)
def test_ranks_divide_into_replicas(world_size: int, dp_replicate: int, shape: tuple[int, int]) -> None:
    mesh = MeshShape.split(world_size, dp_replicate)
    assert mesh.shape == shape
    assert mesh.world_size == world_size


@pytest.mark.parametrize(
    ("world_size", "dp_replicate", "message"),
    [
        (6, 4, "dp_replicate 4 does not divide 6 ranks: 6 = 4 x 1 + 2; use 1, 2, 3, 6"),
        (2, 3, "dp_replicate 3 does not divide 2 ranks: 2 = 3 x 0 + 2; use 1, 2"),
        (4, 0, "dp_replicate must be a whole number of at least 1, not 0"),
        (0, 1, "the world size must be at least 1, not 0"),
    ],
)
def test_a_split_that_cannot_be_shows_the_arithmetic(
    world_size: int, dp_replicate: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        MeshShape.split(world_size, dp_replicate)
    assert str(caught.value) == message
    with pytest.raises(ConfigError):
        build_mesh("cpu", world_size, dp_replicate)


def test_one_rank_needs_no_mesh_and_no_process_group() -> None:
    assert build_mesh("cpu", 1) is None
    assert shape_of(None) == MeshShape(1, 1)


def test_the_arithmetic_needs_no_torch() -> None:
    code = "import sys, engine.run.mesh as m; m.MeshShape.split(4, 2); assert 'torch' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
