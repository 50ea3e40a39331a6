"""`merge`: the average of several checkpoints' weights as a new checkpoint."""

from __future__ import annotations

import argparse

from engine.checkpoints.progress import cleaning_up_on_sigterm, meter
from engine.checkpoints.target import open_checkpoint
from engine.storage.open import open_storage
from engine.text import readable_bytes


def run(arguments: argparse.Namespace) -> int:
    """Commit the average, and print where."""
    from engine.convert.merge import merge_checkpoints, shares_of

    shares_of(arguments.weights, len(arguments.target))
    sources = [
        open_checkpoint(argparse.Namespace(**{**vars(arguments), "target": target}))
        for target in arguments.target
    ]
    directory = open_storage(arguments.to, dict(arguments.storage_options))
    with cleaning_up_on_sigterm(), meter("merge") as bar:
        record = merge_checkpoints(
            sources, directory, weights=arguments.weights, on_total=bar.on_total, progress=bar.progress
        )
    size = readable_bytes(record.bytes)
    print(f"{len(sources)} checkpoints are merged into {record.path} ({size}, model only)")
    return 0
