"""Writes safetensors files for other tools, front to back, one window at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.convert.tensors import Progress, raw_bytes
from engine.format.element_types import header_sizes, itemsize
from engine.format.manifest import TensorInfo

SHARD_BYTES = 5_000_000_000
"""Hugging Face's limit, above which a model is split into several files."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ALIGN_BYTES = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write, and its rows."""

    name: str
    info: TensorInfo
    windows: Callable[[], Iterator[torch.Tensor]]


def write_model(folder: Path, entries: Sequence[Entry], shard_bytes: int, progress: Progress) -> None:
    """Write `model.safetensors` into `folder`, or several files and their index above `shard_bytes`."""
    shards = split(entries, shard_bytes)
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, progress)
        weight_map |= {entry.name: file for entry in shard}
    total_bytes = sum(entry.info.tensor_bytes for entry in entries)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def split(entries: Sequence[Entry], most_bytes: int) -> list[list[Entry]]:
    """Divide entries into files of at most `most_bytes`, unless one tensor is larger. Pure."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.info.tensor_bytes > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.info.tensor_bytes
    return shards


def write_file(path: Path, entries: Sequence[Entry], progress: Progress) -> None:
    """Write one safetensors file. OSError if it cannot be written."""
    # By element size, so that each tensor is aligned to its own.
    ordered = sorted(entries, key=lambda entry: (-itemsize(entry.info.dtype), entry.name))
    with open(path, "wb") as file:
        file.write(_header(ordered))
        for entry in ordered:
            for window in entry.windows():
                file.write(raw_bytes(window))
                progress(window.numel() * window.element_size())


def _header(entries: Sequence[Entry]) -> bytes:
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        end = begin + entry.info.tensor_bytes
        document[entry.name] = {
            "dtype": entry.info.dtype,
            "shape": list(header_sizes(entry.info.dtype, entry.info.shape)),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(document, separators=(",", ":")).encode()
    padded = text.ljust(-(-len(text) // _ALIGN_BYTES) * _ALIGN_BYTES)
    return struct.pack("<Q", len(padded)) + padded
