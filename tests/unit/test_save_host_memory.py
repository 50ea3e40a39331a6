"""How much host memory is left, according to fake /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.save.host_memory import NO_LIMIT, available_bytes

GB = 1 << 30


def machine(root: Path, available: int = 16 * GB, group: str | None = "/pod/box") -> Path:
    """A root with that much available, and this process in `group`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n")
    if group is not None:
        (root / "proc/self/cgroup").write_text(f"4:memory:/old\n0::{group}\n")
        (root / "sys/fs/cgroup" / group[1:]).mkdir(parents=True)
    return root


def limit(root: Path, group: str, most: int | str, used: int = 0, files: int = 0) -> None:
    """Limit a group of `root`; of what it uses, `files` are pages of files."""
    folder = root / "sys/fs/cgroup" / group[1:]
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 5\nactive_file {files // 2}\ninactive_file {files - files // 2}\n"
    )


@pytest.mark.parametrize("group", [None, "/", "/pod/box"])
def test_without_limits_it_is_what_the_machine_has(tmp_path: Path, group: str | None) -> None:
    assert available_bytes(machine(tmp_path, group=group)) == 16 * GB


@pytest.mark.parametrize(
    ("group", "most", "used", "files", "left"),
    [
        ("/pod/box", 8 * GB, 2 * GB, 0, 6 * GB),
        ("/pod/box", 8 * GB, 8 * GB, 3 * GB, 3 * GB),
        ("/pod", 4 * GB, 1 * GB, 0, 3 * GB),  # of the group around it
        ("/", 4 * GB, 1 * GB, 0, 3 * GB),
        ("/pod/box", 2 * GB, 3 * GB, 0, 0),  # the limit was lowered since
        ("/pod/box", 64 * GB, 1 * GB, 0, 16 * GB),
        ("/pod/box", "max", 1 * GB, 0, 16 * GB),
    ],
)
def test_the_least_of_all_that_limit_it(
    tmp_path: Path, group: str, most: int | str, used: int, files: int, left: int
) -> None:
    root = machine(tmp_path)
    limit(root, group, most, used, files)
    assert available_bytes(root) == left


def test_a_machine_that_does_not_say_has_no_limit(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (root / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    assert available_bytes(root) == NO_LIMIT


def test_this_machine_has_memory() -> None:
    assert 0 < available_bytes() < NO_LIMIT
