"""`engine.entry` for the example's programs: `model` and `data` are the example's own packages."""

from __future__ import annotations

from engine import entry
from engine.gpt2.own_packages import claim_own_packages


def enter(module: str) -> None:
    """See `engine.entry.enter`."""
    entry.enter(module, first=claim_own_packages)
