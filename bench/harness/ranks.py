"""Ranks go on together or stop together, even where only one of them has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class PeerFailure(Exception):
    """Another rank failed; the text is its error."""


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank. Collective."""
    if not _several():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def barrier() -> None:
    """Wait for all ranks."""
    if _several():
        dist.barrier()


def raise_together(error: BaseException | None) -> None:
    """Raise on every rank if any has an error: its own there, PeerFailure elsewhere. Collective."""
    texts = gather(None if error is None else describe(error))
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise PeerFailure(f"rank {rank}: {text}")


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; return only if it worked on all. Collective."""
    result: list[T] = []
    problem: BaseException | None = None
    try:
        result.append(action())
    except Exception as error:
        problem = error
    raise_together(problem)
    return result[0]


def describe(error: BaseException) -> str:
    """An error in one line: its class, and the first and the last line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    last = lines[-1] if len(lines) > 1 and lines[-1] != first else ""
    text = f"{first} ... {last}" if last else first
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
