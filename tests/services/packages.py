"""What a service needs and this environment has not: installed if possible, named if not."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

INSTALL_SECS = 240.0
"""For any of the installers, which take half a minute; a mirror that hangs must not take the tests along."""

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


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
    with _one_at_a_time("apt"):
        if missing(programs):
            install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
            commands = [["apt-get", "update", "-qq"], install]
            problem = _run([[*command, "-o", "DPkg::Lock::Timeout=120"] for command in commands])
            if problem or missing(programs):
                pytest.skip(f"could not install {', '.join(packages)}: {problem or 'no error was given'}")


def missing(programs: Mapping[str, str]) -> list[str]:
    """The programs that are not on PATH."""
    return [name for name in programs if shutil.which(name) is None]


def need_module(module: str, *packages: str) -> None:
    """See that a Python module can be imported, from a folder of its own if it is not installed.

    What the environment has already counts before what lies there. Skips the test, naming the packages,
    where they cannot be installed.
    """
    if importlib.util.find_spec(module) is not None:
        return
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    folder = _installed((*packages, version), [*pip, "-c", str(CONSTRAINTS), *packages, "--target"], packages)
    sys.path.append(str(folder))
    importlib.invalidate_caches()


def need_npm(package: str) -> Path:
    """The folder `node_modules` that a package of the npm registry lies in, with all that it needs.

    Skips the test, by name, where there is no Node.js or the package cannot be installed.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"not installed: {program}, which {package} needs")
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", package, "--prefix"]
    return _installed((package,), npm, (package,)) / "node_modules"


def _installed(names: Sequence[str], command: Sequence[str], packages: Sequence[str]) -> Path:
    """A folder that all tests of this machine share; `command` gets it as its last argument."""
    folder = _shared("-".join(names).replace("/", "_"))
    with _one_at_a_time(folder.name.removeprefix(_shared("").name)):
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if problem := _run([[*command, str(folder)]]):
                pytest.skip(f"could not install {', '.join(packages)}: {problem}")
            (folder / "whole").touch()
    return folder


def _shared(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"holdfast-tests-{os.geteuid()}-{name}"


@contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """The workers of pytest-xdist come here at the same time."""
    with _shared(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(commands: Sequence[Sequence[str]]) -> str:
    """The end of what the first command said that failed; empty when none did."""
    for command in commands:
        try:
            ran = subprocess.run(
                command,
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
            return " ".join((ran.stdout + ran.stderr).split())[-300:] or f"exit status {ran.returncode}"
    return ""
