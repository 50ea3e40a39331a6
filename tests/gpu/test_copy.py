"""On a CUDA device: staging is as fast as a plain copy, and nothing waits for it longer than it has to.

Times of one run are compared with each other; they are those of the device, on the stream that is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch

from engine.format.layout import Chunk, plan_files
from engine.save.staging_buffer import StagingBuffer
from engine.save.staging_copy import CudaStream, Pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIDE = 1024
COUNT = 128
"""Tensors of 4 MiB: half a GiB."""


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    shape = (SIDE, SIDE)
    chunks = [Chunk(f"t{number:03d}", "F32", shape, (0, 0), shape) for number in range(COUNT)]
    staging = StagingBuffer(plan_files(0, chunks), pin=True)
    staging.wait_ready()
    assert staging.pinned
    views = [staging.view(slot, placed) for slot in staging.slots for placed in slot.layout.chunks]
    return [(view, torch.randn(SIDE, SIDE, device="cuda")) for view in views]


def device_ms(work: Callable[[], None]) -> float:
    """How long the device takes for `work`, all streams together."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def test_the_copy_is_as_fast_as_a_plain_pinned_one(pairs: list[Pair]) -> None:
    stream = CudaStream(torch.device("cuda"))
    source = torch.empty(COUNT * SIDE * SIDE, device="cuda")
    target = torch.empty(source.shape, pin_memory=True)

    def ours() -> None:
        stream.copy(pairs)
        stream.guard_compute()

    def plain() -> None:
        target.copy_(source, non_blocking=True)

    ours()
    plain()
    times = [(device_ms(ours), device_ms(plain)) for _ in range(9)]
    assert all(torch.equal(to, held.cpu()) for to, held in pairs)
    assert median(plain_ms for _, plain_ms in times) >= 0.9 * median(our_ms for our_ms, _ in times)


def test_a_step_that_takes_longer_than_the_copy_does_not_wait_for_it(pairs: list[Pair]) -> None:
    stream = CudaStream(torch.device("cuda"))

    def copy() -> None:
        stream.copy(pairs)
        stream.guard_compute()

    copy()
    copy_ms = device_ms(copy)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    stream.copy(pairs)
    # Cycles of the clock, 1 to 2 of them a nanosecond: several times what the copy takes.
    torch.cuda._sleep(int(copy_ms * 1e6 * 8))
    before.record()
    stream.guard_compute()
    after.record()
    torch.cuda.synchronize()
    assert before.elapsed_time(after) < 0.1 * copy_ms
