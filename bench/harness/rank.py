"""One rank of a benchmark: what `launch.run_ranks` has torch's launcher start."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from pathlib import Path

if __name__ == "__mp_main__":
    # A process that a peer has spawned imports this module again; torch logs every request there.
    logging.disable(logging.WARNING)

_NOISY = ("torch.distributed.device_mesh", "torch.distributed.checkpoint", "torch_checkpointing")
"""Loggers that warn about every single save or load of sharded tensors."""


def main() -> int:
    """Join the other ranks and run the program's `rank`; returns the exit status."""
    from bench.harness.launch import PART, RESULT
    from engine.run.parent import follow_launcher
    from engine.run.world import World, choose_device, join, leave, seed_everything

    follow_launcher()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    part = json.loads(os.environ[PART])
    program, folder = importlib.import_module(part["module"]), Path(part["folder"])
    options = program.parse(part["argv"])
    world = World.from_environ()
    device = choose_device(options.device, world)
    join(world, cuda=device.type == "cuda")
    seed_everything(options.seed, world, deterministic=False, device=device)
    result = program.rank(options, world, device, folder, **part["task"])
    if world.is_first:
        (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
