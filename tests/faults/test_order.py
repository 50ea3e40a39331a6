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
TWO_RANKS = """
import sys
from pathlib import Path
from tests.faults.processes import Process, free_port, one_rank, outcome_of
root, port = Path(sys.argv[1]), free_port()
def start(rank):
    def life(tell, hear):
        with one_rank(rank, 2, port, root, "run") as (ckpt, state, _, _):
            tell("saved", outcome_of(ckpt, state, 1))
    return Process(life)
for process in [start(0), start(1)]:
    assert process.end() == 0, process.told
    assert process.told == [["saved", ["committed", 1]]], process.told
"""
CALLS = "mkdir,fsync,fdatasync,rename,renameat,renameat2,link,linkat,pwrite64,ftruncate,sendto,sendmsg,write"
RECEIPT = "receipt of rank 1"


def calls(trace: str, root: Path) -> list[str]:
    """ "call name [name]" of everything below the root, in order; temporary names as *.tmp. And RECEIPT."""
    found = []
    for line in trace.splitlines():
        matched = re.match(r"(?:\d+ +)?(\w+)\((.*)\) += \d+", line)
        if matched is None:
            continue
        if re.search(r"save/1/receipt/1.*attempt", matched[2]):
            found.append(RECEIPT)
        # Not `\"`: ranks also tell each other the directory, in JSON.
        paths = re.findall(r'(?<!\\)[<"](' + re.escape(str(root)) + r'[^>"]*)[>"]', matched[2])
        if not paths:
            continue
        names = [re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", str(Path(path).relative_to(root))) for path in paths]
        names = [re.sub(r"^step-[^/]+", "ATTEMPT", name) for name in names]
        found.append(" ".join([matched[1].removesuffix("at"), *names]))
    return found


def joined(trace: str) -> str:
    """Calls that others interrupt are split into two lines; joined, they count when they returned."""
    begun: dict[str, str] = {}
    whole = []
    for line in trace.splitlines():
        thread = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        resumed = re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line)
        whole.append(begun.pop(thread) + resumed[1] if resumed and thread in begun else line)
    return "\n".join(whole)


def test_calls_of_several_threads_that_interrupt_each_other_are_put_together() -> None:
    trace = """11 rename("a.tmp",  <unfinished ...>
12 fsync(3 <unfinished ...>
11 <... rename resumed>"a") = 0
13 mkdir("d", 0777) = 0
12 <... fsync resumed>) = 0"""
    expected = ['11 rename("a.tmp","a") = 0', '13 mkdir("d", 0777) = 0', "12 fsync(3) = 0"]
    assert joined(trace).splitlines() == expected


def traced(program: str, root: Path, log: Path) -> list[str]:
    """The calls of a program that gets the root as its argument. Skips where nothing can be traced."""
    strace = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(log)]
    ran = subprocess.run(
        [*strace, sys.executable, "-c", program, root],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "ptrace" in ran.stderr and ran.returncode:
        pytest.skip(f"strace may not trace here: {ran.stderr.splitlines()[0]}")
    assert ran.returncode == 0, ran.stderr
    return calls(joined(log.read_text()), root)


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@pytest.mark.service
@needs_strace
def test_a_rank_reports_only_what_is_durable(tmp_path: Path) -> None:
    """Rank 1 of two: data, index and their names are synced, then its receipt goes out, then the manifest."""
    seen = traced(TWO_RANKS, tmp_path / "checkpoints", tmp_path / "trace")

    def at(call: str, after: int = -1) -> int:
        assert call in seen[after + 1 :], f"{call} is not in {seen[after + 1 :]}"
        return seen.index(call, after + 1)

    index = "ATTEMPT/shard-00001.json"
    receipt, manifest = at(RECEIPT), at("link ATTEMPT/manifest.json.tmp ATTEMPT/manifest.json")
    assert at("fsync ATTEMPT/shard-00001.safetensors") < receipt
    assert at(f"fsync {index}.tmp") < at(f"rename {index}.tmp {index}")
    assert at("fsync ATTEMPT", after=at(f"rename {index}.tmp {index}")) < receipt < manifest


@pytest.mark.service
@needs_strace
def test_data_is_durable_before_the_manifest_and_names_before_and_after(tmp_path: Path) -> None:
    seen = traced(PROGRAM, tmp_path / "checkpoints", tmp_path / "trace")

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
