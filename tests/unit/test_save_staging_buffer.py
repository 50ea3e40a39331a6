"""The host buffer: laid out as the files, page-aligned, private, not forked, within its budget."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import MemoryBudgetError
from engine.format.layout import ShardLayout, plan_files
from engine.save import staging_buffer as staging_module
from engine.save.staging_buffer import StagingBuffer, check_budget, place_files
from engine.storage.aligned_memory import HUGE_PAGE_BYTES, PAGE_BYTES
from tests.support.boxes import box, shards, whole

GIB = 1 << 30


def layouts() -> tuple[ShardLayout, ...]:
    """Two files: the second chunk of "a" goes into a file of its own."""
    first, second = shards("a", (5, 3), 2)
    return plan_files(
        0, [first, second, whole("b", 7, dtype="BF16"), whole("s"), whole("flag", dtype="BOOL")]
    )


def test_files_lie_one_after_the_other_on_page_boundaries() -> None:
    slots = place_files(layouts())
    assert [slot.layout.file for slot in slots] == ["shard-00000.safetensors", "shard-00000-1.safetensors"]
    assert slots[0].begin == 0
    assert slots[1].begin == slots[0].padded_bytes
    for slot in slots:
        assert slot.begin % PAGE_BYTES == slot.padded_bytes % PAGE_BYTES == 0
        assert 0 <= slot.padded_bytes - slot.layout.file_bytes < PAGE_BYTES


def test_what_is_copied_in_is_the_file(tmp_path: Path) -> None:
    staging = StagingBuffer(layouts(), pin=False)
    values = {
        "a": torch.arange(9.0).view(3, 3),
        "b": torch.arange(7).to(torch.bfloat16),
        "s": torch.tensor(2.5),
        "flag": torch.tensor(True),
    }
    for placed in staging.slots[0].layout.chunks:
        staging.view(staging.slots[0], placed).copy_(values[placed.chunk.name])
    (rest,) = staging.slots[1].layout.chunks
    staging.view(staging.slots[1], rest).copy_(torch.full((2, 3), 7.0))
    for slot in staging.slots:
        (tmp_path / slot.layout.file).write_bytes(staging.padded(slot)[: slot.layout.file_bytes])
    loaded = load_file(tmp_path / "shard-00000.safetensors")
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert torch.equal(load_file(tmp_path / "shard-00000-1.safetensors")["a"], torch.full((2, 3), 7.0))


def test_windows_are_aligned_and_padded_with_zeros() -> None:
    staging = StagingBuffer(layouts(), pin=False)
    base = staging.buffer.data_ptr()
    assert base % PAGE_BYTES == 0
    for slot in staging.slots:
        padded = staging.padded(slot)
        assert len(padded) % PAGE_BYTES == 0
        assert ctypes.addressof(ctypes.c_char.from_buffer(padded)) == base + slot.begin
        assert bytes(padded[slot.layout.file_bytes :]).count(0) == len(padded) - slot.layout.file_bytes
    assert (staging.file_bytes, staging.size_bytes) == (
        sum(layout.file_bytes for layout in layouts()),
        sum(slot.padded_bytes for slot in staging.slots),
    )


def mapping_of(address: int) -> tuple[str, set[str]]:
    """(permissions, VmFlags) of the mapping that holds an address."""
    permissions, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span, _, rest = line.partition(" ")
        low, dash, high = span.partition("-")
        if dash and not span.endswith(":"):
            inside = int(low, 16) <= address < int(high, 16)
            permissions = rest.split()[0] if inside else permissions
        elif inside and line.startswith("VmFlags:"):
            return permissions, set(line.split()[1:])
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("elements", [1000, HUGE_PAGE_BYTES], ids=["small", "huge"])
def test_pages_are_private_present_and_not_inherited_by_forks(elements: int) -> None:
    staging = StagingBuffer(plan_files(0, [whole("w", elements)]), pin=False)
    permissions, flags = mapping_of(staging.buffer.data_ptr())
    assert permissions == "rw-p", "a shared mapping gets no huge pages"
    assert "wf" in flags, "forked data workers must not share the pages: MADV_WIPEONFORK"
    if elements == HUGE_PAGE_BYTES:
        assert staging.buffer.data_ptr() % HUGE_PAGE_BYTES == 0
        if Path("/sys/kernel/mm/transparent_hugepage").exists():
            assert "hg" in flags, "MADV_HUGEPAGE"


def resident_pages(address: int, length: int) -> int:
    """Pages of a range that are present, by /proc/self/pagemap."""
    pages = -(-length // PAGE_BYTES)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE_BYTES * 8)
        raw = file.read(pages * 8)
    return sum(raw[at + 7] >> 7 for at in range(0, len(raw), 8))


@pytest.mark.parametrize("populate", [True, False], ids=["madvise", "touching"])
def test_every_page_is_present_before_the_first_copy(populate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not populate:
        monkeypatch.setattr(staging_module, "_MADV_POPULATE_WRITE", -1)  # an older kernel refuses it
    staging = StagingBuffer(plan_files(0, [whole("w", 300_000)]), pin=False)
    staging.wait_ready()
    assert resident_pages(staging.buffer.data_ptr(), staging.size_bytes) == staging.size_bytes // PAGE_BYTES


def test_prefaulting_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "_MADV_POPULATE_WRITE", -1)
    staging = StagingBuffer(plan_files(0, [whole("w", 300_000)]), pin=False)
    staging.wait_ready()
    slot = staging.slots[0]
    assert bytes(staging.padded(slot)[: len(slot.layout.header)]) == slot.layout.header


def test_no_huge_pages_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)
    staging = StagingBuffer(plan_files(0, [whole("w", HUGE_PAGE_BYTES)]), pin=False)
    assert staging.size_bytes > HUGE_PAGE_BYTES


def test_a_forked_child_has_an_empty_range_in_its_place() -> None:
    """The fork does not mark the parent's pages copy-on-write, which direct I/O would trip over. Nor is the
    range free in the child: what it put there would be unmapped with the parent's object."""
    staging = StagingBuffer(plan_files(0, [whole("w", 1000)]), pin=False)
    staging.buffer.fill_(7)
    child = os.fork()
    if child == 0:
        os._exit(1 if bool(staging.buffer.any()) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert int(staging.buffer[-1]) == 7


@pytest.mark.parametrize(
    ("need", "budget", "available", "figures"),
    [
        (10, None, 10, None),
        (10, 10, 10, None),
        (11_000_000, 10_999_999, GIB, ("11,000,000", "10,999,999")),
        (2 * GIB, None, GIB, ("2,147,483,648", "1,073,741,824")),
        (2 * GIB, 4 * GIB, GIB, ("2,147,483,648", "1,073,741,824")),
    ],
)
def test_the_budget(need: int, budget: int | None, available: int, figures: tuple[str, str] | None) -> None:
    if figures is None:
        check_budget(need, budget, available)
        return
    with pytest.raises(MemoryBudgetError) as caught:
        check_budget(need, budget, available)
    assert all(figure in str(caught.value) for figure in figures)


def test_the_budget_is_checked_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "map_pages", lambda size_bytes: pytest.fail("memory was taken"))
    with pytest.raises(MemoryBudgetError, match="but the budget is 4,096 bytes"):
        StagingBuffer(plan_files(0, [whole("w", 3000)]), pin=False, budget_bytes=4096)


def test_releasing_gives_the_memory_back() -> None:
    staging = StagingBuffer(plan_files(0, [whole("w", 1000)]), pin=False)
    address = staging.buffer.data_ptr()
    staging.release()
    with pytest.raises(AssertionError, match="not mapped"):
        mapping_of(address)


def test_a_view_has_the_chunks_own_sizes() -> None:
    part = box("w", (10, 4), (6, 0), (3, 4), "I64")
    staging = StagingBuffer(plan_files(3, [part]), pin=False)
    (slot,) = staging.slots
    view = staging.view(slot, slot.layout.chunks[0])
    assert (view.shape, view.dtype) == ((3, 4), torch.int64)
    assert view.is_contiguous()
    assert view.data_ptr() == staging.buffer.data_ptr() + slot.layout.chunks[0].begin


def test_a_forked_child_may_free_the_arena() -> None:
    """Its collector does, if the parent has left the buffer in a cycle. Nothing of the child's may go."""
    staging = StagingBuffer(plan_files(0, [whole("w", 300_000)]), pin=False)
    staging.wait_ready()
    length = len(staging._map)
    child = os.fork()
    if child == 0:
        # One of these lies where the staging buffer was, if that range was free.
        own = [mmap.mmap(-1, length) for _ in range(8)]
        del staging
        gc.collect()
        for pages in own:
            pages[:] = bytes(length)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_memory_is_pinned_from_the_device_of_the_training_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that pins begins on the first device, where each rank would open a context otherwise."""
    chosen: list[int] = []
    found: list[list[int]] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        chosen.append(index)
        yield
        chosen.pop()

    def pin(buffer: torch.Tensor) -> bool:
        found.append(list(chosen))
        return False

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(staging_module, "_pin", pin)
    staging = StagingBuffer(plan_files(0, [whole("w", 10)]), pin=True)
    staging.wait_ready()
    assert found == [[3]]
    staging.release()
