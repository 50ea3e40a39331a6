"""The way into a program: from its first import on, Ctrl+C ends it with one line.

Its modules take up to a second to import, and Python's own answer to Ctrl+C meanwhile is a traceback out of
the import machinery. So a program's entry imports this module, which imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_OWN = ("model", "data")
"""Our packages whose names are common enough for a user to have a module of the same name."""


def enter(module: str) -> None:
    """Import `module` and call its `run()`, which ends the process when it does not return."""
    try:
        claim_own_packages()
        import_module(module).run()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


def claim_own_packages() -> None:
    """Make `model` and `data` mean ours in this process.

    `python -m` puts the working directory first on the import path, and a user's own `model.py` or `data/`
    lies there. Moving entries of the path about was rejected: PYTHONPATH may name that folder as well.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for name in _OWN:
        spec = PathFinder.find_spec(name, [root])
        if name in sys.modules or spec is None or spec.loader is None:
            continue
        package = module_from_spec(spec)
        sys.modules[name] = package
        spec.loader.exec_module(package)
