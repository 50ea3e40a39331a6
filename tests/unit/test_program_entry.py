"""Ctrl+C while a program is still being imported: one line and the status for it, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HIT = """
import os, runpy, signal, sys

class Hit:
    def find_spec(self, name, path=None, target=None):
        if name == {when!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Hit())
sys.argv[1:] = {argv!r}
runpy.run_module({program!r}, run_name="__main__", alter_sys=True)
"""


def hit(program: str, when: str, *argv: str, rank: str = "0") -> tuple[int, str, str]:
    """Run a program that gets SIGINT when it is about to import the module `when`."""
    code = HIT.format(program=program, when=when, argv=list(argv))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize(
    ("program", "when", "argv"),
    [
        ("engine.train", "engine.train.session", ()),
        ("engine.train", "tyro", ()),
        ("engine.checkpoints", "engine.checkpoints.arguments", ("list", "/no/such/place")),
        ("engine.checkpoints", "engine.checkpoints.list_command", ("list", "/no/such/place")),
    ],
)
def test_it_is_one_line(program: str, when: str, argv: tuple[str, ...]) -> None:
    assert hit(program, when, *argv) == (130, "", "interrupted\n")


def test_rank_0_says_it_for_all() -> None:
    assert hit("engine.train", "tyro", rank="1") == (130, "", "")
