"""`model` and `data` are common names: in the example's programs they must mean its own packages."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_OWN = ("model", "data")


def claim_own_packages() -> None:
    """Make `model` and `data` mean ours in this process.

    `python -m` puts the working directory first on the import path, where a user's own `model.py` or `data/`
    may be. Reordering the path was rejected: PYTHONPATH may contain that folder, too.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for name in _OWN:
        spec = PathFinder.find_spec(name, [root])
        if name in sys.modules or spec is None or spec.loader is None:
            continue
        package = module_from_spec(spec)
        sys.modules[name] = package
        spec.loader.exec_module(package)
