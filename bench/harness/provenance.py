"""Where and with what a result was measured: enough to judge it, but no name of a person or a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.harness.launch import ROOT
from engine.native import kernels

_PACKAGES = ("torch", "numpy", "safetensors", "torch_checkpointing", "torchsnapshot")


def collect(directory: Path, device: str = "cpu") -> dict[str, Any]:
    """What a result records beside its samples. Of `directory`, only the file system is named."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "git": git_state(ROOT),
        "versions": {"python": platform.python_version(), **versions_of(_PACKAGES)},
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
            "kernel": platform.release(),
            "compiled_loops": kernels.library is not None,
            "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "device": device,
        "file_system": file_system(directory.resolve(), _read("/proc/self/mountinfo").splitlines()),
    }


def git_state(root: Path) -> dict[str, Any]:
    """The revision, and whether tracked files differ from it; None for both outside a repository."""
    revision = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision or None, "dirty": bool(changes) if revision else None}


def file_system(path: Path, mounts: Sequence[str]) -> dict[str, str]:
    """Type, device and options of the mount that holds `path`. Pure.

    Args:
        mounts: lines of /proc/self/mountinfo; see proc(5) for their fields.
    """
    best, found = -1, {"type": "unknown", "device": "unknown", "options": ""}
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if len(fields) < 6 or len(tail) < 3:
            continue
        point = Path(fields[4].replace("\\040", " "))
        # Of two mounts on one point, the later one covers the other.
        if path.is_relative_to(point) and len(point.parts) >= best:
            best = len(point.parts)
            found = {"type": tail[0], "device": tail[1], "options": tail[2]}
    return found


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git(root: Path, *arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
