"""`python bench/small_tensors.py`: what `save` costs for many small tensors."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run by path: Python has put this folder first, where its modules would hide others of their names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.cases.small_tensors import main

if __name__ == "__main__":
    sys.exit(main())
