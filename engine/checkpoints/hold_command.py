"""`hold` and `release`: exempt one checkpoint from retention, and give it back."""

from __future__ import annotations

import argparse

from engine.checkpoints.target import open_checkpoint
from engine.directory import marks


def run(arguments: argparse.Namespace) -> int:
    """Set or remove the mark."""
    storage, name = open_checkpoint(arguments)
    if arguments.command == "hold":
        marks.hold(storage, name)
        print(f"{name} is held: retention leaves it alone until `release`")
    else:
        marks.release(storage, name)
        print(f"{name} is released: retention may remove it")
    return 0
