"""Entry of `python -m engine.resume`."""

from __future__ import annotations

from engine.run.entry import enter

if __name__ == "__main__":
    enter("engine.resume.launcher")
