"""The copy into the staging buffer: immediate on CPU, overlapped with training on CUDA.

On CUDA the copy runs on a stream of its own while training continues; only a change of the memory being
copied must wait. Parameters and optimizer state change only in `optimizer.step()`, so a step pre-hook makes
the compute stream wait for the copy's event: the device waits, the CPU does not. Everything else (buffers
that the forward pass changes, a frozen average) is copied before `save` returns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from engine.format.digest import DIGEST_BYTES, block_count
from engine.native import kernels
from engine.save.digesting_copy import Pair, Span, fill_span, plain_runs
from engine.save.staged_snapshot import StagedSnapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Copies made together; after them the staging buffer is filled up to byte `end`.

    span: the bytes of the shard file that they fill, if any.
    """

    pairs: tuple[Pair, ...]
    end: int
    span: Span | None = None


class CopyStream(Protocol):
    """A device stream beside the compute stream. Tests use one that needs no device."""

    def copy(self, pairs: Sequence[Pair]) -> None:
        """Start copying, after all work that is queued on the compute stream."""

    def guard_compute(self) -> None:
        """Make the compute stream, but not the CPU, wait for the copies started so far."""

    def finish(self) -> None:
        """Block the calling thread until the copies started so far are done."""

    @property
    def done(self) -> bool:
        """Whether the copies started so far are done."""


class CudaStream:
    """A side stream with one event."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def copy(self, pairs: Sequence[Pair]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy_pairs(pairs, non_blocking=True)
            for _, source in pairs:
                # The allocator must not reuse this memory while the copy still reads it.
                source.record_stream(self._stream)
        self._event.record(self._stream)

    def guard_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def finish(self) -> None:
        with torch.cuda.device(self._device):  # the calling thread has set no device
            self._event.synchronize()

    @property
    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class Copier:
    """Copies a snapshot, and prevents optimizers from changing memory that is still being copied.

    Args:
        stream: the side stream, or None to copy everything before `copy` returns.
        optimizers: those whose `step` must wait for an overlapped copy.
        digest: whether to digest while copying, if the loops in C are there. For a state in host memory,
            whose bytes pass through the processor anyway.
    """

    def __init__(
        self, stream: CopyStream | None, optimizers: Sequence[Optimizer], *, digest: bool = False
    ) -> None:
        self._stream = stream
        self._digest = digest and kernels.library is not None
        self._in_flight = False
        if kernels.library is None:
            log.info(
                "copies and digests are slower, because the C loops are not available: %s",
                kernels.missing_because,
            )
        self._hooks = (
            [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
            if stream
            else []
        )

    @property
    def overlaps(self) -> bool:
        """Whether there is a side stream to copy on."""
        return self._stream is not None

    def copy(self, eager: Sequence[Batch], overlapped: Sequence[Pair], staged: StagedSnapshot) -> None:
        """Copy `eager` before returning, and `overlapped` too unless there is a side stream.

        Without overlapped copies `staged` advances batch by batch, so that writing starts meanwhile.
        It receives the digests of files that were digested on the way.
        """
        if overlapped:
            copy_pairs([pair for batch in eager for pair in batch.pairs], non_blocking=False)
            if self._stream is None:
                copy_pairs(overlapped, non_blocking=False)
            else:
                self._stream.copy(overlapped)
                self._in_flight = True
            staged.advance(eager[-1].end)
            return
        digests: dict[str, bytearray] = {}
        for batch in eager:
            if self._digest and batch.span is not None:
                copy_digesting(batch.pairs, batch.span, digests)
                if batch.span.ends_file:
                    staged.note_digests(batch.span.file, bytes(digests[batch.span.file]))
            else:
                copy_pairs(batch.pairs, non_blocking=False)
            staged.advance(batch.end)

    def finish(self) -> None:
        """Block until everything is copied. For the thread that writes the snapshot."""
        if self._stream is not None and self._in_flight:
            self._stream.finish()

    def guard(self) -> None:
        """Make training's next work on the device wait for the copy: for weight changes outside `step()`."""
        if self._stream is not None and self._in_flight:
            self._stream.guard_compute()
            self._in_flight = not self._stream.done

    def remove(self) -> None:
        """Remove the hooks from the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.guard()


def copy_pairs(pairs: Sequence[Pair], *, non_blocking: bool) -> None:
    """Copy each source into its destination, in one call."""
    if pairs:
        with torch.no_grad():
            # Private, but torch's own optimizers are built on it; a test notices when it moves. With 10,000
            # small tensors, one call for each would cost more than the copies.
            torch._foreach_copy_(
                [to for to, _ in pairs], [source for _, source in pairs], non_blocking=non_blocking
            )


def copy_digesting(pairs: Sequence[Pair], span: Span, digests: dict[str, bytearray]) -> None:
    """Make the copies that fill a span, and add the digests of its blocks to those of its file."""
    runs, rest = plain_runs(pairs)
    copy_pairs(rest, non_blocking=False)
    packed = digests.setdefault(span.file, bytearray(block_count(span.file_bytes) * DIGEST_BYTES))
    fill_span(span, runs, packed)
