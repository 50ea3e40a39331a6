"""CPU time, memory and disk bytes of this process, its threads and its children, from /proc."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SAMPLE_SECS = 0.01

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 1 << 20
_MOST_MAPPED_BYTES = 32 << 20
"""How far glibc raises `M_MMAP_THRESHOLD` by itself; it keeps `M_TRIM_THRESHOLD` at twice that."""


def thread_ids() -> frozenset[int]:
    """The threads of this process."""
    return frozenset(int(name) for name in os.listdir("/proc/self/task"))


def descendants(pid: int | None = None) -> list[int]:
    """The process ids of all descendants of a process; None stands for this one."""
    found = []
    for child in _children(os.getpid() if pid is None else pid):
        found += [child, *descendants(child)]
    return found


def _children(pid: int) -> list[int]:
    children = []
    with contextlib.suppress(OSError):  # the process or thread has just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                children += [int(child) for child in file.read().split()]
    return children


@dataclass(frozen=True, slots=True)
class CpuReading:
    """CPU seconds so far: of the process, of its training threads, of its children."""

    process: float
    training: float
    children: float


class CpuMeter:
    """Separates the CPU time of saves from that of training.

    Training runs on the threads that existed before any mode was opened (main, OpenMP, autograd, gloo).
    All other CPU time belongs to the save: that of later threads, even ended ones, and of child processes.
    During the call of `save` the training threads work for the save, too.

    Kernel threads that write dirty pages back belong to no process: buffered writers look cheaper than they
    are.
    """

    def __init__(self, training: Iterable[int]) -> None:
        self._training = sorted(training)

    def read(self) -> CpuReading:
        """The CPU time up to now. Only differences of two readings have a meaning."""
        return CpuReading(
            process=time.process_time(),
            training=sum(_thread_secs(thread) for thread in self._training),
            children=_children_secs(),
        )


def saving_secs(begin: CpuReading, returned: CpuReading, end: CpuReading) -> float:
    """CPU seconds of a save: all until its call has returned, then all but the training threads'. Pure."""
    call = returned.process - begin.process
    after = (end.process - returned.process) - (end.training - returned.training)
    return max(0.0, call + after + end.children - begin.children)


def total_secs(begin: CpuReading, end: CpuReading) -> float:
    """CPU seconds of everything between two readings. Pure."""
    return end.process - begin.process + end.children - begin.children


def _thread_secs(thread: int) -> float:
    """CPU seconds of a thread of this process; 0 when it has ended."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat", encoding="ascii") as file:
            return int(file.read().split()[0]) / 1e9
    except (OSError, IndexError, ValueError):
        # Coarser, but every kernel has it.
        return sum(_ticks(f"/proc/self/task/{thread}/stat")[:2]) / os.sysconf("SC_CLK_TCK")


def _children_secs() -> float:
    """CPU seconds of all children, those that have ended included."""
    ended = os.times()
    ticks = sum(sum(_ticks(f"/proc/{child}/stat")) for child in descendants())
    return ended.children_user + ended.children_system + ticks / os.sysconf("SC_CLK_TCK")


def _ticks(path: str) -> list[int]:
    """User and system time, and the same of children that have ended, in clock ticks; see proc(5)."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return [int(field) for field in file.read().rpartition(")")[2].split()[11:15]]
    except OSError:
        return [0, 0, 0, 0]


def written_bytes() -> int:
    """Bytes that this process and its living children have written to storage."""
    return sum(_disk_bytes(pid, "write_bytes") for pid in (os.getpid(), *descendants()))


def read_bytes() -> int:
    """Bytes that this process has read from storage, which the page cache did not have."""
    return _disk_bytes(os.getpid(), "read_bytes")


def _disk_bytes(pid: int, name: str) -> int:
    with contextlib.suppress(OSError):  # the process has just ended
        return int(_fields(f"/proc/{pid}/io")[name])
    return 0


def _fields(path: str) -> dict[str, str]:
    """The lines of a file in /proc that read "name: value"."""
    with open(path, encoding="ascii", errors="replace") as file:
        return dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)


def memory_bytes() -> int:
    """Anonymous and shared memory of this process and its children; shared pages count once.

    Pages of files do not count: the kernel can drop them at any time.
    """
    return sum(_process_bytes(pid) for pid in (os.getpid(), *descendants()))


def _process_bytes(pid: int) -> int:
    try:
        fields = _fields(f"/proc/{pid}/smaps_rollup")
    except OSError:  # the process has just ended
        return 0
    if "Pss_Anon" in fields:
        return _kilobytes(fields["Pss_Anon"]) + _kilobytes(fields["Pss_Shmem"])
    return _kilobytes(fields["Pss"])


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status, such as VmRSS: cheaper to read than `memory_bytes`, but coarser."""
    return _kilobytes(_fields("/proc/self/status")[name])


def settle_memory() -> None:
    """Free what can be freed, so that the next reading shows what is really in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def mapped_blocks() -> Iterator[None]:
    """Within, malloc maps every block of 1 MiB or more separately, and returns it as soon as it is freed.

    When a larger block is freed, glibc raises that limit, up to 32 MiB; smaller blocks then come from its
    heap. The peak of training then depends on the state of the heap, and so on the modes that ran before:
    0.85 to 1.2 GB were seen for the same steps. Afterwards the limit is 32 MiB, the highest that glibc
    chooses, for all modes alike. Blocks may still fill holes that the heap already has: call
    `settle_memory` first. Does nothing in a C library without `mallopt`. Source: mallopt(3).
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", lambda *_: 0)
    mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _MOST_MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_MAPPED_BYTES)


class PeakMemory:
    """The highest `memory_bytes` within a `with` block, sampled on a thread.

    Sampling walks page tables, which slows down everything else: do not use it in a timed window.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="bench-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, memory_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECS):
            self.peak_bytes = max(self.peak_bytes, memory_bytes())


def sync_file_system(directory: str | os.PathLike[str]) -> None:
    """Wait until the file system of `directory` has written everything, including deletions."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed", os.fspath(directory))
    finally:
        os.close(fd)
