"""Initial weights as a function of (seed, parameter name) alone, at any world size and sharding.

Every rank draws the whole tensor of a parameter, from that parameter's own generator, and keeps its shard.
Drawing only the shard would be cheaper, but the values would then depend on the sharding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

STD = 0.02
"""GPT-2's standard deviation for Linear and Embedding weights."""

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
_BLOCK = re.compile(r"(?:^|\.)h\.(\d+)\.")


def canonical_name(name: str) -> str:
    """Return a parameter's name without what torch.compile, DDP and activation checkpointing add."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:
        del parts[0]
    return ".".join(parts)


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter of a GPT-2 in place, each rank its own shard; no communication.

    The values follow Hugging Face's `GPT2PreTrainedModel._init_weights`: normal with standard deviation 0.02,
    divided by sqrt(2 n_layer) for the projections that end a residual branch; biases 0, LayerNorm weights 1.
    They are drawn in float32 on the CPU and then cast, so that they do not depend on the device. Global RNG
    state is not touched.

    Args:
        model: materialised (`to_empty`), plain or after `fully_shard`, DDP or torch.compile.
        seed: any int.

    Raises:
        ValueError: a parameter is on the meta device, or a parameter or buffer has no rule and would keep
            uninitialised memory.
    """
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    scale = 1 / sqrt(2 * _layers(parameters))
    unknown = [canonical_name(name) for name, _ in model.named_buffers()]
    unknown += [name for name in parameters if name.rpartition(".")[2] not in ("weight", "bias")]
    if unknown:
        raise ValueError(f"init_weights has no rule for {', '.join(sorted(unknown))}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device: call to_empty before init_weights")
            _fill(parameter, name, seed, scale)


def _layers(names: Iterable[str]) -> int:
    """Number of blocks among canonical names, at least 1."""
    return len({match[1] for match in map(_BLOCK.search, names) if match}) or 1


def _fill(parameter: Tensor, name: str, seed: int, residual_scale: float) -> None:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if kind == "bias":
        local.zero_()
    elif leaf.startswith("ln_"):
        local.fill_(1.0)
    elif local.numel():
        std = STD * residual_scale if leaf == "c_proj" else STD
        full = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        full.normal_(0.0, std, generator=_generator(seed, name))
        local.copy_(full[_local_slices(parameter)])


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # Torch's CPU generator uses only the low 32 bits of its seed.
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:4], "little"))


def _local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """The position of this rank's shard in the whole tensor."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds a parameter on it"
    return local_slices(tuple(parameter.shape), parameter.placements, tuple(mesh.shape), tuple(coordinate))


def local_slices(
    shape: Sequence[int],
    placements: Sequence[Placement],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
) -> tuple[slice, ...]:
    """Return the part of a tensor of `shape` that a mesh's rank at `coordinate` holds.

    `distribute_tensor` would move the whole tensor to the device first.

    Raises:
        ValueError: a placement other than Shard and Replicate.
    """
    begins, sizes = [0] * len(shape), list(shape)
    for placement, ranks, rank in zip(placements, mesh_shape, coordinate, strict=True):
        if type(placement) is Shard:
            size, offset = Shard.local_shard_size_and_offset(sizes[placement.dim], ranks, rank)
            begins[placement.dim] += int(offset)
            sizes[placement.dim] = int(size)
        elif type(placement) is not Replicate:
            raise ValueError(f"init_weights knows Shard and Replicate, not {placement}")
    return tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
