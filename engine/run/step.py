"""One optimizer step, and one evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.run.job import Job
from engine.run.parallelize import clip_gradients, gradient_sync
from engine.run.shared_stop import Agreement, Vote

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss`: mean over the global batch in nats per token, equal on every rank; `vote`: the ranks' votes."""

    loss: float
    lr: float
    vote: Vote


def train_step(job: Job, agreement: Agreement, *, must_stop: Callable[[], bool]) -> StepResult:
    """Take one optimizer step on the next batch. `must_stop`: whether this rank wants to end the run.

    Collective. One reduction carries loss and votes; it is also the step's only wait for the device.
    """
    inputs, targets = job.loader.next_batch()
    loss = _forward_backward(job, inputs, targets)
    if job.config.grad_clip > 0:
        clip_gradients(job.parameters, job.config.grad_clip)
    lr = job.schedule.advance()
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    vote = agreement.vote(loss / job.world.world_size, stop=must_stop())
    return StepResult(vote.total, lr, vote)


def _forward_backward(job: Job, inputs: Rows, targets: Rows) -> Tensor:
    """Accumulate the gradient of this rank's rows; returns the mean loss, a float64 scalar on the device."""
    job.model.train()
    pieces = job.split.accumulation
    total = torch.zeros((), dtype=torch.float64, device=job.device)
    for piece in range(pieces):
        x, y = _micro_batch(job, inputs, targets, piece)
        with gradient_sync(job.model, piece == pieces - 1):
            _, loss = job.model(x, y)
            (loss / pieces).backward()
        total += loss.detach().double()
    return total / pieces


def evaluate(job: Job, agreement: Agreement) -> tuple[float | None, int | None]:
    """(mean loss over the first validation batches, None), or (None, the signal that interrupted it).

    Collective. The ranks vote after every batch, so that a signal need not wait for the last one.
    """
    assert job.val_loader is not None, "evaluations are off"
    job.model.eval()
    losses = []
    with torch.no_grad():
        for inputs, targets in job.val_loader.first_batches(job.config.eval_batches):
            total = torch.zeros((), dtype=torch.float64, device=job.device)
            for piece in range(job.split.accumulation):
                _, loss = job.model(*_micro_batch(job, inputs, targets, piece))
                total += loss.double()
            vote = agreement.vote(total / (job.split.accumulation * job.world.world_size))
            if vote.signum is not None:
                return None, vote.signum
            losses.append(vote.total)
    return sum(losses) / len(losses), None


def _micro_batch(job: Job, inputs: Rows, targets: Rows, piece: int) -> tuple[Tensor, Tensor]:
    rows = slice(piece * job.split.micro_batch, (piece + 1) * job.split.micro_batch)
    x, y = torch.from_numpy(inputs[rows]), torch.from_numpy(targets[rows])
    return x.to(job.device, non_blocking=True), y.to(job.device, non_blocking=True)
