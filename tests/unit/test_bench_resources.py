"""CPU seconds by who used them, memory and written bytes of a process and its children."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.harness.resources import (
    CpuMeter,
    CpuReading,
    PeakMemory,
    descendants,
    memory_bytes,
    saving_secs,
    sync_file_system,
    thread_ids,
    total_secs,
    written_bytes,
)

MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    ("begin", "returned", "end", "saving"),
    [
        # All in the call: a synchronous save, whatever threads it used.
        ((10, 8, 0), (12, 10, 0), (20, 18, 0), 2),
        # A thread of its own: what the process used beyond its training threads.
        ((10, 8, 0), (10, 8, 0), (20, 15, 0), 3),
        # A child process.
        ((10, 8, 5), (10, 8, 5), (20, 18, 9), 4),
        # All of it.
        ((10, 8, 5), (12, 10, 5), (20, 15, 9), 2 + 3 + 4),
        # Clocks of different grain must not make it negative.
        ((10, 8, 0), (10, 8, 0), (11, 9.01, 0), 0),
    ],
)
def test_a_save_is_charged_for_all_but_training(
    begin: tuple[float, ...], returned: tuple[float, ...], end: tuple[float, ...], saving: float
) -> None:
    readings = [CpuReading(*reading) for reading in (begin, returned, end)]
    assert saving_secs(*readings) == pytest.approx(saving)
    assert total_secs(readings[0], readings[2]) == end[0] - begin[0] + end[2] - begin[2]


def burn(secs: float) -> None:
    """Use CPU time, counted by the CPU clock: how busy the machine is does not matter."""
    until = time.thread_time() + secs
    while time.thread_time() < until:
        pass


def test_cpu_of_a_later_thread_is_not_training() -> None:
    meter = CpuMeter(thread_ids())
    before = meter.read()
    thread = threading.Thread(target=burn, args=(0.1,))
    thread.start()
    thread.join()
    between = meter.read()
    burn(0.1)
    after = meter.read()
    assert saving_secs(before, before, between) >= 0.09
    assert after.training - between.training >= 0.09
    assert saving_secs(between, between, after) < 0.05


def test_cpu_of_a_child_that_has_ended_is_counted() -> None:
    meter = CpuMeter(thread_ids())
    before = meter.read()
    code = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert saving_secs(before, before, meter.read()) >= 0.15


def test_memory_and_bytes_of_a_living_child_are_counted(tmp_path: Path) -> None:
    memory, written = memory_bytes(), written_bytes()
    code = (
        "import os, sys\n"
        f"held = bytearray(os.urandom({8 * MEGABYTE}))\n"
        "with open(sys.argv[1], 'wb') as file: file.write(held); os.fsync(file.fileno())\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert child.pid in descendants()
        assert memory_bytes() - memory >= 8 * MEGABYTE
        if os.stat(tmp_path).st_dev != os.stat("/dev/shm").st_dev:  # tmpfs has no storage behind it
            assert written_bytes() - written >= 8 * MEGABYTE
        child.communicate()
    assert child.pid not in descendants()


def test_the_peak_is_noticed_although_it_is_gone() -> None:
    level = memory_bytes()
    with PeakMemory() as peak:
        held = mmap.mmap(-1, 32 * MEGABYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held.write(b"x" * (32 * MEGABYTE))
        while peak.peak_bytes < level + 30 * MEGABYTE:  # until the sampler has come by
            time.sleep(0)
        held.close()
    assert memory_bytes() < level + 16 * MEGABYTE
    assert peak.peak_bytes >= level + 30 * MEGABYTE


FREED_BETWEEN = """
import ctypes, sys
from bench.harness.resources import mapped_blocks, memory_bytes, settle_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def block(size):
    address = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(address, 1, size)
    return address

def left_by_a_block():
    settle_memory()
    # Below another block, so that the heap cannot give it back by getting shorter.
    lower, upper = block(8 << 20), block(4096)
    held = memory_bytes()
    libc.free(lower)
    freed = held - memory_bytes()
    libc.free(upper)
    return (8 << 20) - freed

libc.free(block(30 << 20))
print(left_by_a_block())
with mapped_blocks():
    print(left_by_a_block())
print(left_by_a_block())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_what_is_freed_is_gone_while_memory_is_measured() -> None:
    """In a process of its own: the limits of malloc are not given back."""
    run = subprocess.run([sys.executable, "-c", FREED_BETWEEN], capture_output=True, text=True, check=True)
    before, within, after = (int(line) for line in run.stdout.split())
    assert before > 7 * MEGABYTE
    assert within < MEGABYTE
    assert after > 7 * MEGABYTE


def test_syncing_a_file_system_needs_a_directory(tmp_path: Path) -> None:
    sync_file_system(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_file_system(tmp_path / "nothing")
