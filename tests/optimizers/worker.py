"""Runs every optimizer of a library up to a save, or from the restore on, in a process of its own.

    python -m tests.optimizers.worker save LIBRARY DIRECTORY [NAME ...]
    python -m tests.optimizers.worker resume LIBRARY DIRECTORY [NAME ...]

`save` writes what an undisturbed run ends with, a Holdfast checkpoint and a `torch.save` file of the middle.
`resume` continues from each with new objects, and prints one line of JSON for each class.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from engine import Checkpointer
from tests.optimizers.libraries import recipe_of
from tests.optimizers.recipes import STEPS, Model, Recipe, classes_of


def build(cls: type, recipe: Recipe) -> tuple[nn.Module, Optimizer]:
    """A new model and its optimizer, always the same."""
    torch.manual_seed(0)
    model = Model(rich=recipe.rich, width=recipe.width)
    return model, recipe.build(cls, model)


def train(model: nn.Module, optimizer: Optimizer, recipe: Recipe, first: int) -> None:
    """`STEPS` steps on batches that depend on the number of the step alone."""
    np.random.seed(first)  # Kron balances now and then, by the global generator of NumPy
    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(2, 8, recipe.width, generator=generator).unbind()
        recipe.step(optimizer, model, lambda: (model(x) - y).square().mean())  # noqa: B023


def contents(value: Any) -> Any:
    """What a value is, to the bit, as JSON."""
    if isinstance(value, torch.Tensor):
        flatten = getattr(type(value), "__tensor_flatten__", None)
        if flatten is not None:
            names, context = value.__tensor_flatten__()
            return [type(value).__name__, str(context), *[contents(getattr(value, name)) for name in names]]
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]
    if isinstance(value, dict):
        return {repr(key): contents(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [contents(item) for item in value]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted(map(repr, value))]
    if type(value).__repr__ is object.__repr__:
        return [type(value).__name__, contents(vars(value))] if hasattr(value, "__dict__") else "opaque"
    return [type(value).__name__, repr(value)]


def optimizer_contents(optimizer: Optimizer, names: dict[torch.Tensor, str]) -> Any:
    """Groups and state by the names of parameters, and those of optimizers inside."""
    state = {
        names.get(key, repr(key)) if isinstance(key, torch.Tensor) else repr(key): contents(value)
        for key, value in getattr(optimizer, "state", {}).items()
        if not (isinstance(value, dict) and not value)
    }
    # Classes and functions among the hyperparameters are the program's, no state.
    groups = [
        {key: contents(value) for key, value in group.items() if key != "params" and not callable(value)}
        for group in getattr(optimizer, "param_groups", ())
    ]
    inner = {
        key: optimizer_contents(value, names)
        for key, value in vars(optimizer).items()
        if isinstance(value, Optimizer)
    }
    return {"state": dict(sorted(state.items())), "groups": groups, "inner": inner}


def outcome(model: nn.Module, optimizer: Optimizer) -> Any:
    """Everything that has to be equal at the end."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        "weights": contents(dict(model.state_dict())),
        "optimizer": optimizer_contents(optimizer, names),
    }


def difference(found: Any, expected: Any, path: str = "") -> str:
    """The first place where two outcomes differ, or ""."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            if key not in found or key not in expected:
                return f"{path}.{key}: only in {'found' if key in found else 'expected'}"
            if inside := difference(found[key], expected[key], f"{path}.{key}"):
                return inside
        return ""
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return next(filter(None, (difference(a, b, f"{path}[{i}]") for i, (a, b) in pairs)), "")
    if found == expected:
        return ""
    return f"{path}: {str(found)[:120]} instead of {str(expected)[:120]}"


def save(cls: type, recipe: Recipe, directory: Path) -> dict[str, Any]:
    """The undisturbed run, then one that is saved in the middle."""
    model, optimizer = build(cls, recipe)
    train(model, optimizer, recipe, 0)
    middle = outcome(model, optimizer)
    train(model, optimizer, recipe, STEPS)
    expected = outcome(model, optimizer)
    if expected["weights"] == middle["weights"]:
        return {"error": "the optimizer changes nothing"}

    model, optimizer = build(cls, recipe)
    train(model, optimizer, recipe, 0)
    rng = torch.get_rng_state()
    directory.mkdir(parents=True)
    report: dict[str, Any] = {"expected": expected, "torch": "", "holdfast": ""}
    try:
        both = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng}
        torch.save(both, directory / "torch.pt")
    except Exception as error:
        report["torch"] = f"{type(error).__name__}: {error}"[:300]
    torch.set_rng_state(rng)
    try:
        with Checkpointer(directory / "holdfast", {"model": model, "optimizer": optimizer}) as checkpointer:
            checkpointer.save(STEPS)
            checkpointer.wait()
    except Exception as error:
        report["holdfast"] = f"save: {type(error).__name__}: {error}"[:600]
    else:
        if difference(outcome(model, optimizer), middle):
            report["holdfast"] = f"save changed {difference(outcome(model, optimizer), middle)}"
    return report


def resume(cls: type, recipe: Recipe, directory: Path, report: dict[str, Any]) -> dict[str, str]:
    """Continue from both checkpoints. Values: "exact", or what went wrong."""
    result = {"torch": report["torch"], "holdfast": report["holdfast"]}
    if not result["torch"]:
        try:
            model, optimizer = build(cls, recipe)
            saved = torch.load(directory / "torch.pt", weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
            train(model, optimizer, recipe, STEPS)
            result["torch"] = difference(outcome(model, optimizer), report["expected"]) or "exact"
        except Exception as error:
            result["torch"] = f"{type(error).__name__}: {error}"[:300]
    if not result["holdfast"]:
        try:
            model, optimizer = build(cls, recipe)
            state = {"model": model, "optimizer": optimizer}
            with Checkpointer(directory / "holdfast", state) as checkpointer:
                checkpointer.restore("latest")
                train(model, optimizer, recipe, STEPS)
            result["holdfast"] = difference(outcome(model, optimizer), report["expected"]) or "exact"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            result["holdfast"] = f"resume: {type(error).__name__} at {where}: {error}"[:600]
    return result


def main(mode: str, library: str, root: Path, names: list[str]) -> None:
    """Every class of the library, or those that are named."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, cls in classes_of(library).items():
        recipe = recipe_of(library, name)
        if isinstance(recipe, str) or (names and name not in names):
            continue
        directory = root / name
        try:
            if mode == "save":
                report = save(cls, recipe, directory)
                directory.mkdir(parents=True, exist_ok=True)
                (directory / "report.json").write_text(json.dumps(report))
                continue
            report = json.loads((directory / "report.json").read_text())
            result = report if "error" in report else resume(cls, recipe, directory, report)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"[:400]
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "report.json").write_text(json.dumps({"error": text}))
            continue
        print(json.dumps({"class": name, **result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
