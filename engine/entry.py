"""The way into a program: from its first import on, Ctrl+C ends it with one line.

Its modules take up to a second to import, and Python's own answer to Ctrl+C meanwhile is a traceback out of
the import machinery. So a program's entry imports this module, which imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module


def enter(module: str, *, first: Callable[[], None] = lambda: None) -> None:
    """Call `first`, import `module` and call its `run()`, which ends the process when it does not return."""
    try:
        first()
        import_module(module).run()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
