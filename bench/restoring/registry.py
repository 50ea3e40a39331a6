"""The rows by name, in the order of the tables."""

from __future__ import annotations

HOLDFAST = "holdfast"
REFERENCE = "dcp.load"
"""What ratios are taken of: torch's own load of its own checkpoint."""

STOCK_READER = "HuggingFaceStorageReader"
PEER = "torch_checkpointing"
TORCH_LOAD = "torch.load"

ROWS = (HOLDFAST, REFERENCE, STOCK_READER, PEER, TORCH_LOAD)
