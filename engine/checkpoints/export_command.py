"""`export`: one checkpoint as what another tool reads."""

from __future__ import annotations

import argparse

from engine.checkpoints.kinds import installed_kinds
from engine.checkpoints.progress import cleaning_up_on_sigterm, meter
from engine.checkpoints.target import open_target, select
from engine.checkpoints.text import printable
from engine.directory.listing import list_checkpoints
from engine.storage.redact import redact_uri


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint that was named or selected to a new place."""
    # Imported here, as in the other commands that read tensors: it brings torch.
    from engine.convert.export import ExportOptions, export_checkpoint

    options = ExportOptions(format=arguments.format, dtype=arguments.dtype, model_only=arguments.model_only)
    target = open_target(arguments)
    storage = target.storage
    name = target.name or select(storage, list_checkpoints(storage), arguments.select).id
    with cleaning_up_on_sigterm(), meter("export") as bar:
        export_checkpoint(
            storage,
            name,
            arguments.to,
            options,
            kinds=installed_kinds(),
            storage_options=dict(arguments.storage_options),
            on_total=bar.on_total,
            progress=bar.progress,
        )
    print(
        printable(f"{storage.describe(name)} is exported to {redact_uri(arguments.to)} ({arguments.format})")
    )
    return 0
