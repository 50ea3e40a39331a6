"""Programs that a service needs from the operating system: installed if possible, named if not."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

INSTALL_SECS = 240.0
"""For `apt-get`, which takes half a minute; a mirror that hangs must not take the tests along."""


def need(programs: Mapping[str, str]) -> None:
    """See that every program is there; {"radosgw": "radosgw"} is program -> Debian package.

    Installs what is missing when we are root and there is apt, one process at a time. Otherwise skips the
    test, naming the packages.
    """
    if not missing(programs):
        return
    packages = sorted({programs[name] for name in missing(programs)})
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"not installed: {', '.join(packages)} (only root can install them, with apt-get)")
    # The workers of pytest-xdist come here at the same time.
    with (Path(tempfile.gettempdir()) / "holdfast-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if missing(programs):
            problem = _install(packages)
            if problem or missing(programs):
                pytest.skip(f"could not install {', '.join(packages)}: {problem or 'no error was given'}")


def missing(programs: Mapping[str, str]) -> list[str]:
    """The programs that are not on PATH."""
    return [name for name in programs if shutil.which(name) is None]


def _install(packages: list[str]) -> str:
    """The end of what apt-get said when it failed; empty when it did not."""
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], install):
        try:
            ran = subprocess.run(
                [*command, "-o", "DPkg::Lock::Timeout=120"],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{' '.join(command[:2])} took longer than {INSTALL_SECS:.0f} s"
        if ran.returncode != 0:
            return " ".join((ran.stdout + ran.stderr).split())[-300:]
    return ""
