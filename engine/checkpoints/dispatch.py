"""`python -m engine.checkpoints`: one command; errors become one sentence and an exit code.

0: success. 1: `verify` found damage, `diff` a difference, `selftest` an unsafe storage. 2: bad input, damage
in what had to be read, or a storage that did not answer. 130: Ctrl+C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from engine.checkpoints.arguments import parse
from engine.checkpoints.terminal import printable
from engine.errors import HoldfastError

EXIT_BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A user's mistake never raises."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        _log_to_stderr()
        code = _run(arguments)
        sys.stdout.flush()
    except HoldfastError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader of our output (head, less) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(arguments: argparse.Namespace) -> int:
    """Import and run one command. The other commands' modules are not loaded, for a quick start."""
    match arguments.command:
        case "list":
            from engine.checkpoints.list_command import run
        case "show":
            from engine.checkpoints.show_command import run
        case "verify":
            from engine.checkpoints.verify_command import run
        case "prune":
            from engine.checkpoints.retention_commands import run_prune as run
        case "selftest":
            from engine.checkpoints.selftest_command import run
        case "export":
            from engine.checkpoints.convert_commands import run_export as run
        case "import":
            from engine.checkpoints.convert_commands import run_import as run
        case "merge":
            from engine.checkpoints.convert_commands import run_merge as run
        case "copy":
            from engine.checkpoints.copy_command import run
        case "diff":
            from engine.checkpoints.diff_command import run
        case _:
            from engine.checkpoints.retention_commands import run_hold as run
    return run(arguments)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("engine")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


def run() -> None:
    """Run the program, and exit."""
    sys.exit(main())
