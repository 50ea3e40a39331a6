"""Wrappers of modules and optimizers: a model has the same names with and without them.

A wrapper is recognised by its class. The class is looked up among the modules that are loaded already: a
library that is not imported has wrapped nothing, and importing torch._dynamo alone takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from engine.errors import UnsavableValueError


@dataclass(frozen=True, slots=True)
class NamedModule:
    """One occurrence of a module below a root.

    name: its canonical name, without the wrappers above it; "" for the root. prefix: the prefix of its keys
    in the root's state_dict(). Both end with a dot unless empty.
    """

    name: str
    prefix: str
    module: nn.Module


_FABRIC = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")

_WRAPPERS: tuple[tuple[str, str, dict[str, str]], ...] = (
    # (module, class, {attribute that holds the wrapped module: its part of the keys of state_dict()})
    ("torch.nn.parallel.distributed", "DistributedDataParallel", {"module": "module."}),
    ("torch.nn.parallel.data_parallel", "DataParallel", {"module": "module."}),
    ("torch._dynamo.eval_frame", "OptimizedModule", {"_orig_mod": "_orig_mod."}),
    # Base of torch's checkpoint_wrapper and offload_wrapper; its hook removes the attribute from the keys.
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        {"_checkpoint_wrapped_module": ""},
    ),
    # Its state_dict() is that of the user's module; the other attribute is DDP or the like around it.
    *((name, "_FabricModule", {"_original_module": "", "_forward_module": ""}) for name in _FABRIC),
)

_OPTIMIZER_WRAPPERS = (
    ("accelerate.optimizer", "AcceleratedOptimizer"),
    *((name, "_FabricOptimizer") for name in _FABRIC),
    ("lightning.pytorch.core.optimizer", "LightningOptimizer"),
    ("pytorch_lightning.core.optimizer", "LightningOptimizer"),
)

_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


def named_modules(root: nn.Module) -> list[NamedModule]:
    """Every module of a tree, wrappers included, with its canonical name, in the order of state_dict()."""
    return list(_walk(root, "", "", _wrappers(), set()))


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None for a module that is not a wrapper."""
    for kind, attributes in _wrappers():
        if isinstance(module, kind):
            return module._modules[next(iter(attributes))]
    return None


def spelled_as(root: nn.Module, key: str) -> str:
    """A key of load_state_dict() as state_dict() spells it: the hooks of some wrappers take them out."""
    module: nn.Module | None = root
    parts = []
    for part in key.split("."):
        inside = next((found for kind, found in _wrappers() if isinstance(module, kind)), {})
        if inside.get(part, part):
            parts.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(parts)


def _wrappers() -> list[tuple[type, dict[str, str]]]:
    return [
        (found, attributes)
        for module, name, attributes in _WRAPPERS
        if (found := loaded_class(module, name)) is not None
    ]


def _walk(
    module: nn.Module,
    name: str,
    prefix: str,
    wrappers: list[tuple[type, dict[str, str]]],
    above: set[int],
) -> Iterator[NamedModule]:
    yield NamedModule(name, prefix, module)
    inside: dict[str, str] = next((found for kind, found in wrappers if isinstance(module, kind)), {})
    above = above | {id(module)}
    for attribute, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        part = f"{attribute}."
        wrapped = attribute in inside
        yield from _walk(
            child,
            name if wrapped else name + part,
            prefix + (inside[attribute] if wrapped else part),
            wrappers,
            above,
        )


def refuse_unsavable(key: str, root: nn.Module) -> None:
    """Raises: UnsavableValueError for FSDP1, whose parameters are not those of the modules inside it."""
    fsdp1 = loaded_class(*_FSDP1)
    if fsdp1 is None:
        return
    for name, module in root.named_modules():
        if isinstance(module, fsdp1):
            raise UnsavableValueError(
                f"{key}{'.' if name else ''}{name} is a FullyShardedDataParallel (FSDP1), which keeps its "
                "parameters flattened and cannot be saved as it is; shard the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )


def unwrapped_optimizer(entry: Any) -> Any:
    """The optimizer inside a framework's wrapper; any other entry as it is.

    A wrapper may hold copies of the optimizer's attributes, which load_state_dict() would not update.
    """
    if not isinstance(entry, Optimizer) and type(entry).__module__.partition(".")[0] == "torch":
        return entry
    for module, name in _OPTIMIZER_WRAPPERS:
        found = loaded_class(module, name)
        if found is not None and isinstance(entry, found):
            return unwrapped_optimizer(entry.optimizer)
    return entry


def loaded_class(module: str, name: str) -> Any:
    """A class, if its module has been imported already; else None."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None
