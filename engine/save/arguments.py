"""What a Checkpointer may be asked for, before anything is touched."""

from __future__ import annotations

import operator
import os
from typing import SupportsIndex

from engine.errors import ConfigError
from engine.format.manifest import REASONS


def check_arguments(busy: str, timeout_secs: float, overlap: bool | str, mirror_freq: int) -> None:
    """ConfigError for an argument that cannot work."""
    if busy not in ("wait", "skip"):
        raise ConfigError(f"busy is {busy!r}: it must be 'wait' or 'skip'")
    if timeout_secs <= 0:
        raise ConfigError(f"timeout_secs is {timeout_secs}: it must be above 0")
    if overlap not in ("auto", False):
        raise ConfigError(f"overlap is {overlap!r}: it must be 'auto' or False")
    if mirror_freq < 0:
        raise ConfigError(f"mirror_freq is {mirror_freq}: it must be a number of steps, 0 or more")


def check_addresses(*addresses: str | os.PathLike[str] | None) -> None:
    """ConfigError for an address that is no Unicode text: ranks tell each other where a checkpoint lies."""
    for address in addresses:
        try:
            os.fspath(address or "").encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{address!a} is not text in UTF-8: give another directory") from None


def whole_numbers(**given: SupportsIndex) -> list[int]:
    """The numbers as JSON can hold them, in order; NumPy's and torch's are taken. ConfigError for others."""
    for name, value in given.items():
        try:
            operator.index(value)
        except TypeError:
            raise ConfigError(f"{name} is {value!r}: it must be a whole number") from None
    return [operator.index(value) for value in given.values()]


def check_save(step: int, reasons: tuple[str, ...]) -> None:
    """ConfigError for a save that makes no sense."""
    unknown = [reason for reason in reasons if reason not in REASONS]
    if step < 0 or unknown or not reasons:
        raise ConfigError(
            f"save(step={step}, reasons={reasons}): steps start at 0, reasons are {', '.join(REASONS)}"
        )
