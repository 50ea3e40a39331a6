"""Starts a program so that Ctrl+C ends it with one line, even during its imports.

A program's modules take up to a second to import. Ctrl+C in that time would print a traceback out of the
import machinery. So a program's entry imports this module, which imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module


def enter(module: str, *, first: Callable[[], None] = lambda: None) -> None:
    """Call `first`, import `module` and call its `run()`, which may end the process."""
    try:
        first()
        import_module(module).run()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
