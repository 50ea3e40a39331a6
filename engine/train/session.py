"""The program `python -m engine.train` around the training: flags, signals, logging and exit."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from engine.errors import ConfigError, HoldfastError
from engine.mirror.uploader import copies_hang
from engine.process_end import end_at_once
from engine.run.cli import is_first_rank, parse
from engine.run.config import TrainConfig
from engine.run.parent import follow_launcher, orphan_check
from engine.run.preemption import STARTUP_GRACE_SECS, Preemption, Request
from engine.save.unclosed import anything_hangs

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    follow_launcher()
    # First of all: if another rank ends early, rank 0 must survive torchrun's SIGTERM to say why.
    preemption = Preemption(Request(STARTUP_GRACE_SECS), orphaned=orphan_check())
    preemption.install()
    _configure_logging()
    try:
        session = parse(argv)
        if session.list_checkpoints:
            return _list(session) if is_first_rank() else 0
    except ConfigError as error:
        return _refuse(error)
    return _train(argv, session, preemption)


def _train(argv: Sequence[str], session: TrainConfig, preemption: Preemption) -> int:
    import torch

    from data.errors import DataError
    from engine.run.shared_stop import Agreement, Stopped
    from engine.run.trainer import train
    from engine.run.world import World, join, leave

    world = World()
    agreement = Agreement(0, 1, lambda: preemption.signum)
    try:
        world = World.from_environ()
        join(world, cuda=session.device != "cpu" and torch.cuda.is_available())
        agreement = Agreement(world.rank, world.world_size, lambda: preemption.signum)
        train(argv, session, agreement, preemption, world)
        leave()
    except Stopped as stopped:
        if world.is_first:
            print(stopped, flush=True)
        return 128 + stopped.signum
    except (HoldfastError, DataError) as error:
        return _refuse(error, agreed=agreement.failed)
    except Exception:
        traceback.print_exc()
        # At once: a clean exit would wait for a save's thread, which waits for a dead rank.
        end_at_once(1)
    return 0


def _refuse(error: Exception, *, agreed: bool = True) -> int:
    """Print the error: rank 0 for all ranks, or the one rank that failed alone."""
    if is_first_rank():
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif not agreed:
        print(f"error: rank {os.environ.get('RANK')}: {error}", file=sys.stderr, flush=True)
    return USER_ERROR


def _list(session: TrainConfig) -> int:
    from engine.checkpoints.dispatch import main as checkpoints

    options = [f"--storage_options={option}" for option in session.storage_options]
    if session.mirror is not None:
        options.append(f"--mirror={session.mirror}")
    return checkpoints(["list", session.checkpoint_dir, *options])


def _configure_logging() -> None:
    """Log warnings of every rank and rank 0's infos to standard error. Only programs configure logging."""
    rank = os.environ.get("RANK", "0")
    handler = logging.StreamHandler()
    # The console has a line for these; without the filter, every rank would log a failed save again.
    on_console = ("engine.save.job", "engine.mirror.uploader")
    handler.addFilter(lambda record: record.name not in on_console or record.levelno < logging.ERROR)
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(message)s"))
    for name in ("engine", "data"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)
        logger.propagate = False


def end_process(
    status: int,
    environ: Mapping[str, str] = os.environ,
    *,
    leave_at_once: Callable[[int], None] = end_at_once,
) -> None:
    """End the program, without interpreter shutdown under torchrun or while a save hangs.

    A gloo worker thread releases its last tensor some time after the collective and takes the GIL to do so.
    During interpreter shutdown that kills the thread inside C++ code, and the process dies of SIGABRT: seen
    with torch 2.13 in 1 run of 100 on busy cores, in `ProcessGroupGloo::runLoop` ->
    `TensorImpl::decref_pyobject`. All that must finish is closed before this call. Destroying the process
    group does not help, because a wrapped model keeps it alive.
    """
    if "RANK" not in environ and not anything_hangs() and not copies_hang():
        sys.exit(status)
    leave_at_once(status)


def run() -> None:
    """Run the program to the end of the process."""
    end_process(main())
