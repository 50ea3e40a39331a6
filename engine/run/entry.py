"""The way into the example's programs: `engine.entry`, and `model` and `data` are the example's own."""

from __future__ import annotations

from engine import entry
from engine.gpt2.own_packages import claim_own_packages


def enter(module: str) -> None:
    """See `engine.entry.enter`."""
    entry.enter(module, first=claim_own_packages)
