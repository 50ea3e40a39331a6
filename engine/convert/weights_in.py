"""Opens Hugging Face's `pytorch_model.bin`, as one file or several with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.convert.opened import Joined, Opened
from engine.convert.pt_in import open_pt
from engine.convert.safetensors_in import files_of_index, read_json, refuse_lacking
from engine.convert.tensors import TensorSource
from engine.errors import DamagedError

BIN_FILES = ("pytorch_model.bin", "pytorch_model_fsdp.bin", "adapter_model.bin")
"""Files that hold only a model's weights; the second is Accelerate's, of a whole FSDP model."""

BIN_INDEX = "pytorch_model.bin.index.json"


def open_bin_shards(path: Path, files: list[Path] | None, trust_pickle: bool) -> Opened:
    """The model in these files of a directory, or in those that its index lists.

    Raises: StateError if loading one would run code and `trust_pickle` is not set; DamagedError; OSError.
    """
    wanted: set[str] = set()
    if files is None:
        files, wanted = files_of_index(path / BIN_INDEX)
    model: dict[str, Any] = {}
    sources: list[TensorSource] = []
    notes: list[str] = []
    for file in files:
        tree, tensors, said = open_pt(file, trust_pickle=trust_pickle, prefix=file.name)
        both = model.keys() & tree.keys()
        if both:
            raise DamagedError(f"{file} and another file of {path} both hold a tensor {min(both)!r}")
        model |= tree
        sources.append(tensors)
        notes += said
    refuse_lacking(wanted - model.keys(), path)
    config = path / "config.json"
    tree = {"model": model, "config": read_json(config) if config.exists() else {}}
    return Opened("pt", tree, Joined(*sources), tuple(notes))
