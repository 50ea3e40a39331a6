"""On a CUDA device: the snapshot is that of the step that was saved, although training went on at once.

Skipped where there is no device; tests/unit/test_save_staging_copy.py tests the logic with a fake stream.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine import Checkpointer
from engine.errors import SaveFailedError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class Net(nn.Module):
    """Large enough that a copy takes longer than a kernel launch; counts its forward passes in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8)))
        self.register_buffer("passes", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        out: torch.Tensor = self.body(x)
        return out


def training() -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(0)
    net = Net().cuda()
    # Small steps: eight layers without anything between them soon give values that are not finite.
    return net, torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)


def step(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(16, 2048, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def frozen(net: Net, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [*net.state_dict().values()]
    tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in tensors]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("overlap", ["auto", False])
def test_the_snapshot_is_of_the_step_that_was_saved(tmp_path: Path, overlap: str | bool) -> None:
    net, optimizer = training()
    step(net, optimizer)
    with Checkpointer(tmp_path, {"model": net, "optimizer": optimizer}, overlap=overlap) as ckpt:
        ckpt.prepare()
        before = frozen(net, optimizer)
        for number in range(1, 6):
            step(net, optimizer)
            expected = frozen(net, optimizer)
            assert not equal(before, expected), "each snapshot has to differ from the one before"
            handle = ckpt.save(number)
            for _ in range(3):
                step(net, optimizer)
            assert handle.result() is not None
            ckpt.restore(f"step:{number}")
            assert equal(frozen(net, optimizer), expected)
            before = expected


def test_snapshots_under_steps_that_follow_at_once_prove_consistent(tmp_path: Path) -> None:
    """What was written, read back, against digests of the live tensors at the moment of `save`."""
    net, optimizer = training()
    step(net, optimizer)
    state = {"model": net, "optimizer": optimizer}
    with Checkpointer(tmp_path, state, check_snapshots=True) as ckpt:
        ckpt.prepare()
        for number in range(1, 6):
            handle = ckpt.save(number)
            for _ in range(3):
                step(net, optimizer)
            assert handle.result() is not None


def test_a_change_that_does_not_wait_is_found(tmp_path: Path) -> None:
    """Without the guard, a weight that is overwritten at once tears the snapshot, and the check says so."""
    net, optimizer = training()
    step(net, optimizer)
    with Checkpointer(tmp_path, {"model": net, "optimizer": optimizer}, check_snapshots=True) as ckpt:
        ckpt.prepare()
        assert ckpt._saver is not None
        stream = ckpt._saver.copier._stream
        assert stream is not None, "copies overlap here"
        # The side stream is kept busy, so that the copy cannot have been made by the time of the change.
        with torch.cuda.stream(stream._stream):  # type: ignore[attr-defined]
            torch.cuda._sleep(1_000_000_000)
        handle = ckpt.save(1)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        with pytest.raises(SaveFailedError, match="differ from those in memory when save"):
            handle.result()


def test_changes_outside_the_optimizer_wait_under_guard(tmp_path: Path) -> None:
    net, optimizer = training()
    step(net, optimizer)
    with Checkpointer(tmp_path, {"model": net, "optimizer": optimizer}) as ckpt:
        expected = frozen(net, optimizer)
        handle = ckpt.save(1)
        with ckpt.guard(), torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        assert handle.result() is not None
        ckpt.restore("step:1")
        assert equal(frozen(net, optimizer), expected)


def test_the_devices_generator_is_restored(tmp_path: Path) -> None:
    net, optimizer = training()
    with Checkpointer(tmp_path, {"model": net, "optimizer": optimizer}) as ckpt:
        ckpt.save(1).result()
        first = torch.randn(8, device="cuda")
        ckpt.restore()
        assert torch.equal(torch.randn(8, device="cuda"), first)


def test_a_restore_takes_no_memory_of_the_states_size_on_the_device(tmp_path: Path) -> None:
    """Through a small pinned buffer straight into the tensors."""
    net, optimizer = training()
    step(net, optimizer)
    with Checkpointer(tmp_path, {"model": net, "optimizer": optimizer}) as ckpt:
        ckpt.save(1).result()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ckpt.restore()
        assert torch.cuda.max_memory_allocated() - before < 32 << 20
