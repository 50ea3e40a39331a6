"""Entry of `python -m engine.checkpoints`."""

from __future__ import annotations

from engine.entry import enter

if __name__ == "__main__":
    enter("engine.checkpoints.dispatch")
