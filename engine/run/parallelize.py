"""Distributes a model over the ranks of a mesh with FSDP2, HSDP or DDP, or leaves it whole.

The model starts on the meta device and is materialised here, so that no rank ever holds more than its share.
This module depends on no model: the blocks come from the model's `blocks()`, the values from the caller's
`initialise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from engine.run.mesh import REPLICATE, SHARD, shape_of


def build_model(
    make: Callable[[], nn.Module],
    initialise: Callable[[nn.Module], None],
    *,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    bf16: bool = False,
    compile: bool = False,
) -> nn.Module:
    """Build a model on the meta device and `parallelize` it.

    Args:
        make: builds the model; runs with the meta device as the default, so it allocates nothing.
        initialise, device, mesh, bf16, compile: as in `parallelize`.
    """
    with torch.device("meta"):
        model = make()
    return parallelize(model, mesh, initialise, device=device, bf16=bf16, compile=compile)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    initialise: Callable[[nn.Module], None],
    *,
    device: torch.device,
    bf16: bool = False,
    compile: bool = False,
    compile_backend: str = "inductor",
) -> nn.Module:
    """Shard or replicate a meta-device model in place, materialise it on `device`, and initialise it.

    | mesh (dp_replicate, dp_shard) | what is applied                                     |
    |-------------------------------|-----------------------------------------------------|
    | None                          | nothing                                             |
    | (1, S)                        | FSDP2 over S ranks: each block, then the rest       |
    | (R, S)                        | the same, with R replicas (HSDP)                    |
    | (R, 1)                        | DDP over R ranks                                    |

    Args:
        model: on the meta device, identical on every rank. Its optional method `blocks()` returns the modules
            to shard and compile one by one; without it, the model is one block.
        mesh: from `build_mesh`.
        initialise: fills parameters and buffers, which hold uninitialised memory; receives the model before
            DDP wraps it, with DTensor parameters if it is sharded.
        device: where this rank computes; the mesh's device type.
        bf16: compute in bfloat16. Parameters, gradients and reductions stay in float32: FSDP2 has a
            mixed-precision policy for this; elsewhere autocast wraps `forward`.
        compile: torch.compile each block.

    Returns:
        The same module, or the DDP wrapper around it.
    """
    shape, blocks = shape_of(mesh), _blocks(model)
    if compile:
        for block in blocks or [model]:
            # In place: `torch.compile(block)` returns a wrapper that adds "_orig_mod." to every name.
            block.compile(backend=compile_backend)
    if mesh is not None and shape.dp_shard > 1:
        _shard(model, blocks, mesh if shape.dp_replicate > 1 else mesh[SHARD], bf16=bf16)
    elif bf16:
        _autocast(model, device)
    model.to_empty(device=device)
    initialise(model)
    if mesh is None or shape.dp_shard > 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=mesh.get_group(REPLICATE),
        gradient_as_bucket_view=True,
    )


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    blocks = getattr(model, "blocks", None)
    return list(blocks()) if callable(blocks) else []


def _shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, *, bf16: bool) -> None:
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _autocast(model: nn.Module, device: torch.device) -> None:
    # Wraps the method: a pair of hooks would leave autocast on when forward raises.
    model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(model.forward)


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Within this context, backward passes average gradients over replicas only if `enabled`.

    For gradient accumulation: wrap forward and backward of every micro-batch, and enable only the last.
    Gradients are still reduced to their shards each time: accumulating whole gradients would save
    communication but need the memory of an unsharded model.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(enabled)
        try:
            yield
        finally:
            model.set_requires_all_reduce(True)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their global 2-norm is at most `max_norm`; return the norm before.

    Collective if parameters are sharded.

    Returns:
        A plain scalar tensor, equal on every rank; torch's own function returns a DTensor of partial sums.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
