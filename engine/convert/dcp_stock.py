"""Writes stock DCP directories (`.metadata` and `*.distcp`), as `dcp.save` does and `dcp.load` reads them.

Uses DCP's own planner and file writer, with one tensor in memory at a time. They are called directly, in the
order that `torch.distributed.checkpoint.storage.StorageWriter` documents: `dcp.save` would turn every error,
even Ctrl+C, into its CheckpointException, which is not an Exception.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType


def write_stock(folder: Path, state: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> None:
    """Write `state` into the new directory `folder`.

    Args:
        state: a nested dict; its tensors are on the meta device.
        read: returns the tensor on the CPU by its flattened name ("model.layer.weight"); only one is in
            memory at a time.
    Raises: the errors of `read`; OSError.
    """
    planner = _LazyPlanner(read)
    # copy_ahead 0: otherwise, on a machine with CUDA, several tensors would be in memory.
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0)
    planner.set_up_planner(dict(state), writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(planner.finish_plan(plan), planner)
    results.wait()
    writer.finish(metadata, [results.value()])


class _LazyPlanner(DefaultSavePlanner):
    """Reads a tensor right before it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._read = read
        self._written: torch.Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The data of one item. The writer asks for it after it passed the previous one to the disk."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        if self._written is not None:
            # The writer keeps every tensor until the file is closed: free its memory.
            self._written.untyped_storage().resize_(0)
        self._written = self._read(write_item.index.fqn)
        return self._written
