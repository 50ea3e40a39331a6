"""Builds a Saver from its parts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from engine.options import Checks
from engine.ranks.calls import Calls
from engine.ranks.coordination import Coordinator
from engine.save.job import JobRunner
from engine.save.outcomes import Outcomes
from engine.save.overlap import overlap_stream, state_device, why_unguarded
from engine.save.run_directory import RunDirectory
from engine.save.saver import Busy, Saver
from engine.save.snapshot import Snapshot
from engine.save.staging_copy import Copier
from engine.state.capture import StateCapture

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaverOptions:
    """A Checkpointer's options for saving."""

    busy: Busy
    timeout_secs: float
    checks: Checks
    memory_budget_bytes: int | None
    overlap: bool | str


def make_saver(
    ranks: Coordinator,
    calls: Calls,
    capture: StateCapture,
    directory: RunDirectory,
    options: SaverOptions,
    outcomes: Outcomes,
) -> Saver:
    """A saver of this state to that directory."""
    device = state_device(capture.state)
    stream, reason = overlap_stream(options.overlap, device, lambda: why_unguarded(capture.state))
    log.info("snapshots: %s", reason)
    optimizers = [entry for entry in capture.state.values() if isinstance(entry, torch.optim.Optimizer)]
    runner = JobRunner(directory, ranks.channel(), options.timeout_secs, outcomes, directory.listener)
    return Saver(
        capture=capture,
        snapshot=Snapshot(ranks.rank, pin=device.type == "cuda", budget_bytes=options.memory_budget_bytes),
        copier=Copier(stream, optimizers, digest=device.type == "cpu"),
        channel=calls.channel,
        calls=calls,
        runner=runner,
        outcomes=outcomes,
        run_id=ranks.run_id,
        busy=options.busy,
        timeout_secs=options.timeout_secs,
        checks=options.checks,
        on_event=directory.listener,
    )
