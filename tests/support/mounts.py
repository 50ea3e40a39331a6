"""Runs Python in a mount namespace of its own: what it mounts is seen by it alone, and ends with it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.documents import ROOT


@functools.cache
def _command() -> tuple[str, ...] | None:
    """How to get a mount namespace here: as root, or as root of a user namespace. None if neither works."""
    for flags in (["-m"], ["-r", "-m"]):
        command = ("unshare", *flags, "--propagation", "private")
        try:
            tried = subprocess.run([*command, "true"], capture_output=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if tried.returncode == 0:
            return command
    return None


def run_with_mounts(folder: Path, *parts: str) -> str:
    """Run the `parts` of a program, which may `mount(...)` on places below `folder`; returns what it printed.

    Skips the test where no namespace can be had.
    """
    command = _command()
    if command is None:
        pytest.skip("no mount namespace can be had here: not root, and user namespaces are forbidden")
    head = f"""
        import subprocess, sys
        from pathlib import Path
        folder = Path({str(folder)!r})

        def mount(*arguments):
            place = Path(arguments[-1]).resolve()
            assert folder.resolve() in place.parents, place
            subprocess.run(["mount", *map(str, arguments)], check=True)
    """
    script = "\n".join(textwrap.dedent(part) for part in (head, *parts))
    done = subprocess.run(
        [*command, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
