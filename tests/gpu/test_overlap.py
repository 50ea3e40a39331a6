"""On a CUDA device: the snapshot is that of the step that was saved, although training went on at once.

Skipped where there is no device; tests/unit/test_snapshot_copy.py tests the logic with a fake stream.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine import Checkpointer

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
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)


def step(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(16, 2048, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def frozen(net: Net, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [*net.state_dict().values()]
    tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("overlap", ["auto", False])
def test_the_snapshot_is_of_the_step_that_was_saved(tmp_path: Path, overlap: str | bool) -> None:
    net, optimizer = training()
    step(net, optimizer)
    with Checkpointer(tmp_path, {"model": net, "optimizer": optimizer}, overlap=overlap) as ckpt:
        ckpt.prepare()
        for number in range(1, 6):
            expected = frozen(net, optimizer)
            handle = ckpt.save(number)
            for _ in range(3):
                step(net, optimizer)
            assert handle.result() is not None
            ckpt.restore(f"step:{number}")
            found = frozen(net, optimizer)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
        found = frozen(net, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_devices_generator_is_restored(tmp_path: Path) -> None:
    net, optimizer = training()
    with Checkpointer(tmp_path, {"model": net, "optimizer": optimizer}) as ckpt:
        ckpt.save(1).result()
        first = torch.randn(8, device="cuda")
        ckpt.restore()
        assert torch.equal(torch.randn(8, device="cuda"), first)
