"""The optimizers that need more than the default recipe, by library, and those that are left out and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tests.optimizers.recipes import Build, Recipe, closure_step, groups_of, matrices_of


def with_options(**options: Any) -> Build:
    """`cls` over two groups with these options."""
    return lambda cls, model: cls(groups_of(model), **options)


def over_matrices(**options: Any) -> Build:
    """`cls` over the matrices alone."""
    return lambda cls, model: cls(matrices_of(model), **options)


def over_all(**options: Any) -> Build:
    """`cls` over all parameters in one group."""
    return lambda cls, model: cls(list(model.parameters()), **options)


def over_model(**options: Any) -> Build:
    """`cls` over the module itself."""
    return lambda cls, model: cls(model, **options)


def muon_groups(**options: Any) -> Build:
    """Matrices by Muon, everything else by the method beside it."""

    def build(cls: type, model: nn.Module) -> Optimizer:
        matrices = {id(parameter) for parameter in matrices_of(model)}
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) in matrices], "use_muon": True},
            {"params": [p for p in trained if id(p) not in matrices], "use_muon": False},
        ]
        built: Optimizer = cls(groups, **options)
        return built

    return build


def around(**options: Any) -> Build:
    """`cls` around a finished AdamW, which keeps the groups."""
    return lambda cls, model: cls(AdamW(groups_of(model), lr=1e-2), **options)


def sharpness(**options: Any) -> Build:
    """`cls` with the class of a base optimizer, which it makes itself."""
    return lambda cls, model: cls(list(model.parameters()), base_optimizer=AdamW, lr=1e-3, **options)


def build_wsam(cls: type, model: nn.Module) -> Optimizer:
    built: Optimizer = cls(model, list(model.parameters()), base_optimizer=AdamW, lr=1e-3)
    return built


def build_split(cls: type, model: nn.Module) -> Optimizer:
    import heavyball

    matrices = matrices_of(model)
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    specs = [
        {"params": matrices, "optimizer": heavyball.Muon, "lr": 0.01},
        {"params": others, "optimizer": heavyball.AdamW, "lr": 0.001},
    ]
    built: Optimizer = cls(specs)
    return built


def build_gsam(cls: type, model: nn.Module) -> Optimizer:
    from pytorch_optimizer.lr_scheduler import ProportionScheduler

    base = AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(base)
    rho = ProportionScheduler(scheduler, max_lr=1e-3, min_lr=0.0)
    built: Optimizer = cls(list(model.parameters()), base, model, rho)
    return built


def gradients_then_closure(optimizer: Optimizer, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """For two-pass methods: gradients first, then a step that asks for them once more."""
    loss().backward()
    closure_step(optimizer, model, loss)
    optimizer.zero_grad()


def gsam_step(optimizer: Any, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """GSAM asks for outputs and loss itself."""

    def forward_backward() -> tuple[None, torch.Tensor]:
        optimizer.base_optimizer.zero_grad()
        with torch.enable_grad():
            value = loss()
        value.backward()
        return None, value

    optimizer.forward_backward_func = forward_backward
    optimizer.step()


def second_order(optimizer: Optimizer, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """For methods that need the graph of the gradients."""
    loss().backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def fused(optimizer: Any, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """For methods that step within the backward pass."""
    optimizer.fused_backward(loss(), 1e-3)


def scaled(optimizer: Any, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """For a method that scales the loss itself."""
    optimizer.backward(loss())
    optimizer.step()
    optimizer.zero_grad()


def in_train_mode(optimizer: Any, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """For schedule-free methods."""
    optimizer.train()
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def sparse(optimizer: Optimizer, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """Gradients as sparse tensors of the same values."""
    loss().backward()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to_sparse()
    optimizer.step()
    optimizer.zero_grad()


_TORCH = {
    "LBFGS": Recipe(over_all(lr=0.1, max_iter=4), closure_step, rich=False),
    "Muon": Recipe(over_matrices(lr=1e-3)),
    "SparseAdam": Recipe(over_all(lr=1e-3), sparse, rich=False),
}
_MUON = Recipe(muon_groups())
_SCHEDULE_FREE = Recipe(step=in_train_mode)
_PYTORCH_OPTIMIZER = {
    **dict.fromkeys(("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon"), _MUON),
    **dict.fromkeys(("AdaHessian", "SophiaH"), Recipe(step=second_order, rich=False)),
    **dict.fromkeys(("LOMO", "AdaLOMO"), Recipe(over_model(lr=1e-3), fused, rich=False)),
    **dict.fromkeys(("SAM", "FriendlySAM"), Recipe(sharpness(), gradients_then_closure)),
    **dict.fromkeys(("ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"), _SCHEDULE_FREE),
    "AdaShift": Recipe(with_options(lr=1e-2, keep_num=2)),
    "Adai": Recipe(with_options(lr=1.0), rich=False),
    "AdamMini": Recipe(over_model(lr=1e-3)),
    "AliG": Recipe(with_options(max_lr=1e-1), closure_step, rich=False),
    "BSAM": Recipe(over_all(num_data=8, lr=1e-3), gradients_then_closure, rich=False),
    "GSAM": Recipe(build_gsam, gsam_step, rich=False),
    "Kron": Recipe(rich=False),
    "LBFGS": Recipe(over_all(lr=0.1, max_iter=4), closure_step, rich=False),
    "LoRARite": Recipe(rich=False),
    "LookSAM": Recipe(sharpness(k=2), gradients_then_closure),
    "Lookahead": Recipe(around(k=3)),
    "OrthoGrad": Recipe(around()),
    "PCGrad": Recipe(around()),
    "Ranger21": Recipe(with_options(num_iterations=20, lr=1e-3)),
    "SafeFP16Optimizer": Recipe(
        lambda cls, model: cls(AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)),
        scaled,
    ),
    "ScheduleFreeWrapper": Recipe(around(), in_train_mode),
    "SpectralSphere": Recipe(over_matrices(lr=1e-3)),
    "TRAC": Recipe(around(), rich=False),
    "WSAM": Recipe(build_wsam, gradients_then_closure),
}
_SCHEDULEFREE = {
    name: Recipe(step=closure_step if name.endswith("Closure") else in_train_mode)
    for name in (
        *("AdamWScheduleFree", "AdamWScheduleFreeClosure", "AdamWScheduleFreePaper", "SGDScheduleFree"),
        *("AdamWScheduleFreeReference", "RAdamScheduleFree", "RAdamScheduleFreeClosure"),
        *("SGDScheduleFreeClosure", "SGDScheduleFreeReference"),
    )
}

_TORCHAO = {
    name: Recipe(width=64)  # below 4,096 elements nothing is quantized
    for name in ("Adam4bit", "Adam8bit", "AdamFp8", "AdamW4bit", "AdamW8bit", "AdamWFp8", "_AdamW")
}

_HEAVYBALL = {
    "PSGDPRO": Recipe(rich=False),
    "QSGD": Recipe(rich=False),
    "PSGDLRA": Recipe(over_all(lr=1e-3), rich=False),
    "SAMWrapper": Recipe(lambda cls, model: cls(list(model.parameters())), closure_step, rich=False),
    "SplitOpt": Recipe(build_split, rich=False),
}

RECIPES: dict[str, dict[str, Recipe]] = {
    "torch.optim": _TORCH,
    "pytorch_optimizer": _PYTORCH_OPTIMIZER,
    "schedulefree": _SCHEDULEFREE,
    "heavyball": _HEAVYBALL,
    "torchao.optim": _TORCHAO,
}
LEFT_OUT: dict[str, dict[str, str]] = {
    "heavyball": {
        "PSGDBase": "a base class",
        "SOAPBase": "a base class",
    },
    "torchao.optim": {"CPUOffloadOptimizer": "runs on CUDA and XPU only"},
    "pytorch_optimizer": {
        "DeMo": "needs a process group and the package einops",
        "DistributedMuon": "needs a process group",
    },
}


@functools.cache
def recipe_of(library: str, name: str) -> Recipe | str:
    """How to test a class, or the reason why it is not tested."""
    if name in LEFT_OUT.get(library, {}):
        return LEFT_OUT[library][name]
    default = Recipe(rich=library != "heavyball")  # its own state_dict is not exact with bfloat16 parameters
    return RECIPES.get(library, {}).get(name, default)


NOT_EXACT: dict[str, dict[str, str]] = {
    "pytorch_optimizer": dict.fromkeys(
        ("Conda", "ScalableShampoo"), "keeps objects of its own classes as state; torch.load refuses, too"
    ),
}
"""What the first save refuses, and `torch.save` does not bring back exactly either."""
