"""`import`: another tool's checkpoint as a committed one of ours."""

from __future__ import annotations

import argparse

from engine.checkpoints.kinds import installed_kinds
from engine.checkpoints.progress import cleaning_up_on_sigterm, meter
from engine.checkpoints.text import printable
from engine.storage.redact import redact_uri


def run(arguments: argparse.Namespace) -> int:
    """Commit it, print where, and what its user should know about it."""
    from engine.convert.import_checkpoint import import_checkpoint

    with cleaning_up_on_sigterm(), meter("import") as bar:
        record, notes = import_checkpoint(
            arguments.target,
            arguments.to,
            kinds=installed_kinds(),
            storage_options=dict(arguments.storage_options),
            trust_pickle=arguments.trust_pickle,
            on_total=bar.on_total,
            progress=bar.progress,
        )
    print(printable(f"{redact_uri(arguments.target)} is imported as {record.path}"))
    for note in notes:
        print(printable(f"  note: {note}"))
    return 0
