"""What a Checkpointer may be asked for, before anything is touched."""

from __future__ import annotations

import os

from engine.errors import ConfigError


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
