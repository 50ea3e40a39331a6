"""The library without the GPT-2 example: every command works, and what needs the example says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_gpt2 import train
from tests.unit.test_layering import EXAMPLE, ROOT

RUN = """
import contextlib, io, json, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("model", "data"):
            raise ModuleNotFoundError(name)

# An editable installation has a finder that knows the whole repository.
sys.meta_path[:] = [Absent(), BuiltinImporter, FrozenImporter, PathFinder]
from engine.checkpoints.dispatch import main

answers = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library's rooms only."""
    engine = tmp_path_factory.mktemp("library") / "engine"
    engine.mkdir()
    for path in (ROOT / "engine").iterdir():
        if path.stem not in (*EXAMPLE, "__pycache__"):
            (engine / path.name).symlink_to(path)
    return engine.parent


def run(library: Path, *commands: list[Any]) -> list[tuple[int, str, str]]:
    """The exit code, output and errors of each command, all in one process."""
    argv = json.dumps([[str(part) for part in command] for command in commands])
    ran = subprocess.run(
        [sys.executable, "-c", RUN, argv],
        cwd=library,
        env={**os.environ, "PYTHONPATH": str(library)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return [(code, out, err) for code, out, err in json.loads(ran.stdout)]


def test_every_command_works_and_hf_says_what_it_needs(library: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    state, records = train(saved, steps=2)
    torch.save({"model": state["model"].state_dict()}, tmp_path / "theirs.pt")
    one, two = (saved / record.id for record in records)
    *others, diff, imported, hf = run(
        library,
        ["list", saved],
        ["show", saved],
        ["verify", saved],
        ["copy", saved, tmp_path / "copied"],
        ["prune", saved, "--dry_run"],
        ["merge", one, two, "--to", tmp_path / "merged"],
        ["export", saved, "--to", tmp_path / "out.pt", "--format", "torch"],
        ["export", saved, "--to", tmp_path / "dcp", "--format", "dcp"],
        ["import", tmp_path / "out.pt", "--to", tmp_path / "again"],
        ["diff", one, two],
        ["import", tmp_path / "theirs.pt", "--to", tmp_path / "new"],
        ["export", saved, "--to", tmp_path / "hf", "--format", "hf"],
    )
    assert [code for code, _, _ in others] == [0] * len(others), others
    assert diff[0] == 1
    assert imported[0] == 0
    assert "no model kind is installed to convert it (the GPT-2 example, engine.gpt2, has one)" in imported[1]
    assert hf[:2] == (2, "")
    assert "error: --format hf needs a model kind" in hf[2]
    assert "the GPT-2 example (engine.gpt2) has one" in hf[2]
    assert hf[2].count("\n") == 1
    assert not (tmp_path / "hf").exists()
