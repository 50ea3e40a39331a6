"""`export`, `import` and `merge`. They import the converters when they run: those load torch."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from engine.checkpoints.target import open_checkpoint, open_target, select
from engine.checkpoints.terminal import cleaning_up_on_sigterm, meter, printable
from engine.directory.listing import list_checkpoints
from engine.storage.open import open_storage
from engine.storage.redact import redact_uri
from engine.text import readable_bytes

if TYPE_CHECKING:
    from engine.convert.model_kinds import ModelKind

_EXAMPLE = "engine.gpt2"


def run_export(arguments: argparse.Namespace) -> int:
    """Write the named or selected checkpoint to a new path or URI."""
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


def run_import(arguments: argparse.Namespace) -> int:
    """Commit it, and print its path and what the user should know about it."""
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


def run_merge(arguments: argparse.Namespace) -> int:
    """Commit the average, and print its path."""
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


def installed_kinds() -> tuple[ModelKind, ...]:
    """The model kinds for export and import; none if the library is installed alone.

    The example is looked up by name, at run time: the library must not import it. Entry points of
    `importlib.metadata` were rejected: they exist only for what pip has installed, and the example also runs
    from a checkout.
    """
    if find_spec(_EXAMPLE) is None:
        return ()
    found: tuple[ModelKind, ...] = import_module(f"{_EXAMPLE}.plugin").model_kinds()
    return found
