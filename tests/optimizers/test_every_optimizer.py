"""Every optimizer of torch and of four libraries: five steps, save, a new process, restore, five steps.

The end has to equal that of an undisturbed run to the bit: weights, state and hyperparameters. A class is
tested or listed with a reason; where `torch.save` and `load_state_dict` are exact, Holdfast is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optimizers.libraries import LEFT_OUT, NOT_EXACT, RECIPES
from tests.optimizers.recipes import LIBRARIES, classes_of

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECS = 280
SLOW = ("pytorch_optimizer", "heavyball", "torchao.optim")


def run(mode: str, library: str, directory: Path) -> str:
    """One process of `worker.py`: without torch.compile, which changes no figure and takes minutes."""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.optimizers.worker", mode, library, str(directory)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECS,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def verdict(library: str, result: dict[str, str]) -> str:
    """What is wrong with one class, or "". Pure."""
    name = result["class"]
    if "error" in result:
        return f"{name}: does not run: {result['error']}"
    torch_exact, exact = result["torch"] == "exact", result["holdfast"] == "exact"
    listed = name in NOT_EXACT.get(library, {})
    if exact:
        return f"{name}: is exact now; take it off NOT_EXACT" if listed else ""
    if not listed:
        return f"{name}: {result['holdfast']} (torch.save: {result['torch']})"
    if torch_exact:
        return f"{name}: torch.save is exact, so Holdfast has to be: {result['holdfast']}"
    if not result["holdfast"].startswith("save: "):
        return f"{name}: neither exact nor refused by the first save: {result['holdfast']}"
    return ""


@pytest.mark.parametrize(
    "library", [pytest.param(lib, marks=pytest.mark.slow if lib in SLOW else ()) for lib in LIBRARIES]
)
def test_every_optimizer_comes_back_to_the_bit(library: str, tmp_path: Path) -> None:
    run("save", library, tmp_path)
    lines = [line for line in run("resume", library, tmp_path).splitlines() if line.startswith("{")]
    results = [json.loads(line) for line in lines]
    tested = {result["class"] for result in results}
    assert tested == set(classes_of(library)) - set(LEFT_OUT.get(library, {}))
    wrong = [text for result in results if (text := verdict(library, result))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_no_table_names_a_class_that_is_gone() -> None:
    for table in (RECIPES, LEFT_OUT, NOT_EXACT):
        for library, entries in table.items():
            assert set(entries) <= set(classes_of(library)), library


def test_a_verdict_is_right_only_for_what_is_exact_or_listed_with_a_reason() -> None:
    listed = next(iter(NOT_EXACT["pytorch_optimizer"]))
    exact = {"torch": "exact", "holdfast": "exact"}
    refused = {"torch": "UnpicklingError: no", "holdfast": "save: UnsavableValueError: no"}
    assert not verdict("torch.optim", {"class": "SGD", **exact})
    assert verdict("torch.optim", {"class": "SGD", **refused})
    assert verdict("torch.optim", {"class": "SGD", "error": "ValueError"})
    assert not verdict("pytorch_optimizer", {"class": listed, **refused})
    assert verdict("pytorch_optimizer", {"class": listed, **exact})
    assert verdict("pytorch_optimizer", {"class": listed, **refused, "torch": "exact"})
    assert verdict("pytorch_optimizer", {"class": listed, **refused, "holdfast": ".weights differ"})
