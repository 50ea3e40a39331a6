"""The order of a real save's system calls, as the kernel saw them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, torch
from engine import Checkpointer
with Checkpointer(sys.argv[1], {"model": {"w": torch.ones(256, 256)}}) as ckpt:
    ckpt.save(1).result()
"""
CALLS = "mkdir,fsync,fdatasync,rename,renameat,renameat2,link,linkat,pwrite64,ftruncate"


def calls(trace: str, root: Path) -> list[str]:
    """ "call name [name]" of everything below the root, in order; temporary names as *.tmp."""
    found = []
    for line in trace.splitlines():
        matched = re.match(r"(?:\d+ +)?(\w+)\((.*)\) += \d+", line)
        if matched is None:
            continue
        paths = re.findall(r'[<"](' + re.escape(str(root)) + r'[^>"]*)[>"]', matched[2])
        if not paths:
            continue
        names = [re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", str(Path(path).relative_to(root))) for path in paths]
        names = [re.sub(r"^step-[^/]+", "ATTEMPT", name) for name in names]
        found.append(" ".join([matched[1].removesuffix("at"), *names]))
    return found


@pytest.mark.service
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_data_is_durable_before_the_manifest_and_names_before_and_after(tmp_path: Path) -> None:
    root, log = tmp_path / "checkpoints", tmp_path / "trace"
    ran = subprocess.run(
        [
            "strace",
            "-f",
            "-y",
            "-s",
            "4096",
            "-e",
            f"trace={CALLS}",
            "-o",
            str(log),
            sys.executable,
            "-c",
            PROGRAM,
            root,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "ptrace" in ran.stderr and ran.returncode:
        pytest.skip(f"strace may not trace here: {ran.stderr.splitlines()[0]}")
    assert ran.returncode == 0, ran.stderr
    # A call that another thread's interrupts is split into two lines; joined, it counts when it returned.
    text = re.sub(
        r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>\n((?:.*\n)*?)\1 +<\.\.\. \2 resumed>",
        r"\4\1 \2(\3",
        log.read_text(),
    )
    seen = calls(text, root)

    def at(call: str) -> int:
        assert call in seen, f"{call} is not in {seen}"
        return seen.index(call)

    shard, index = "ATTEMPT/shard-00000.safetensors", "ATTEMPT/shard-00000.json"
    manifest = "ATTEMPT/manifest.json"
    directory = [number for number, call in enumerate(seen) if call == "fsync ATTEMPT"]
    at("mkdir ATTEMPT")
    assert at(f"fsync {shard}") < at(f"link {manifest}.tmp {manifest}")
    assert at(f"ftruncate {shard}") < at(f"fsync {shard}")
    assert at(f"fsync {index}.tmp") < at(f"rename {index}.tmp {index}") < directory[0]
    assert at("mkdir ATTEMPT") < next(
        n for n, call in enumerate(seen) if n > at("mkdir ATTEMPT") and call == "fsync ."
    )
    assert directory[0] < at(f"fsync {manifest}.tmp") < at(f"link {manifest}.tmp {manifest}") < directory[-1]
