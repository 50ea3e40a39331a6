"""Recognises which tool wrote a directory by its file names, and opens it.

Supported: safetensors and `.bin` weights of Hugging Face, alone or in a checkpoint of its Trainer or of
Accelerate; DCP, alone or as torchtitan, Accelerate and Lightning write it; DeepSpeed's model states; one
`.pt`. Other tools' directories are refused by name (`elsewhere`).
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.convert.dcp_in import open_dcp
from engine.convert.dcp_stock_read import METADATA
from engine.convert.deepspeed_in import MODEL as DEEPSPEED_MODEL
from engine.convert.deepspeed_in import deepspeed_folder, latest_folder, open_deepspeed
from engine.convert.elsewhere import refuse_elsewhere
from engine.convert.file_kinds import file_kind
from engine.convert.opened import Joined, Opened
from engine.convert.pt_in import open_pt
from engine.convert.safetensors_in import open_safetensors
from engine.convert.safetensors_out import INDEX, SINGLE
from engine.convert.trainer_in import add_companions
from engine.convert.weights_in import BIN_FILES, BIN_INDEX, open_bin_shards
from engine.errors import ConfigError
from engine.format.names import MANIFEST

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_ACCELERATE_DCP = "pytorch_model_fsdp_0"
_ACCELERATE_OPTIMIZER = "optimizer_0"
_LIGHTNING_META = "meta.pt"
_PIECE = re.compile(r"-\d+-of-(\d+)\.(?:safetensors|bin)$")


def open_file(path: Path, trust_pickle: bool) -> Opened:
    """Open one file according to its contents. Raises like `open_pt` and `open_safetensors`."""
    kind = file_kind(path)
    _refuse_piece(path)
    if path.name in BIN_FILES and kind.format == "torch":
        return open_bin_shards(path.parent, [path], trust_pickle)
    if path.name == DEEPSPEED_MODEL:
        return open_deepspeed(path.parent, trust_pickle)
    named = path.suffix == ".safetensors"
    if kind.format == "safetensors" or named:
        tree, tensors = open_safetensors(path)
        said = [] if named else [f"it is {kind.words}, despite its name"]
        return Opened("safetensors", tree, tensors, tuple(said))
    tree, pt_tensors, notes = open_pt(path, trust_pickle=trust_pickle, kind=kind)
    return Opened("pt", tree, pt_tensors, notes)


def open_directory(path: Path, trust_pickle: bool) -> Opened:
    """Open a directory. Raises: ConfigError if it is not supported; StateError if its tool must merge it
    first; DamagedError; OSError.
    """
    if (path / MANIFEST).exists():
        raise ConfigError(f"{path} is already a Holdfast checkpoint: there is nothing to import")
    weights = _weights(path, trust_pickle)
    if weights is not None:
        return add_companions(path, weights, trust_pickle)
    if (path / _ACCELERATE_DCP / METADATA).exists():
        return add_companions(path, _accelerate_dcp(path, trust_pickle), trust_pickle)
    folder = deepspeed_folder(path)
    if folder is not None:
        return open_deepspeed(folder, trust_pickle)
    refuse_elsewhere(path)
    if (path / METADATA).exists():
        return _dcp(path, trust_pickle)
    weights = _single_weights(path)
    if weights is not None:
        return add_companions(path, weights, trust_pickle)
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(files) == 1:
        return open_file(files[0], trust_pickle)
    raise ConfigError(_not_understood(path, files))


def belongs(path: Path, name: str) -> bool:
    """Whether a folder inside a directory belongs to the checkpoint."""
    if name in (_ACCELERATE_DCP, _ACCELERATE_OPTIMIZER):
        return True
    return latest_folder(path) == name


def _weights(path: Path, trust_pickle: bool) -> Opened | None:
    """The weights of a model, in files named like Hugging Face's."""
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return Opened("safetensors", *open_safetensors(path))
    for name in BIN_FILES:
        if (path / name).exists():
            return open_file(path / name, trust_pickle)
    if (path / BIN_INDEX).exists():
        return open_bin_shards(path, None, trust_pickle)
    return None


def _single_weights(path: Path) -> Opened | None:
    """The weights in the directory's only safetensors file, under any name."""
    files = list(path.glob("*.safetensors"))
    for file in files:
        _refuse_piece(file)
    return Opened("safetensors", *open_safetensors(path)) if len(files) == 1 else None


def _refuse_piece(path: Path) -> None:
    """Raises ConfigError for one of several files into which Hugging Face's tools split a large model."""
    piece = _PIECE.search(path.name)
    if piece is not None and int(piece[1]) > 1:
        raise ConfigError(
            f"{path} is one of {int(piece[1])} files of a model: give the directory with all of them and "
            "their index"
        )


def _dcp(path: Path, trust_pickle: bool) -> Opened:
    tree, tensors, notes = open_dcp(path, trust_pickle=trust_pickle)
    if not (path / _LIGHTNING_META).exists():
        return Opened("dcp", tree, tensors, notes)
    # Lightning shards model and optimizers with DCP and stores the rest beside them.
    more, more_tensors, more_notes = open_pt(
        path / _LIGHTNING_META, trust_pickle=trust_pickle, prefix="meta.pt"
    )
    return Opened("dcp", more | tree, Joined(tensors, more_tensors), (*notes, *more_notes))


def _accelerate_dcp(path: Path, trust_pickle: bool) -> Opened:
    """Accelerate's FSDP: model and optimizer are separate DCP directories."""
    tree, tensors, notes = open_dcp(path / _ACCELERATE_DCP, trust_pickle=trust_pickle)
    if not (path / _ACCELERATE_OPTIMIZER / METADATA).exists():
        return Opened("dcp", tree, tensors, notes)
    more, more_tensors, more_notes = open_dcp(path / _ACCELERATE_OPTIMIZER, trust_pickle=trust_pickle)
    return Opened("dcp", more | tree, Joined(tensors, more_tensors), (*notes, *more_notes))


def _not_understood(path: Path, files: list[Path]) -> str:
    inner = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.is_dir() and ((entry / METADATA).exists() or _has_weights(entry))
    )
    if files:
        names = ", ".join(file.name for file in files[:20])
        return f"{path} holds several files that may be checkpoints ({names}): give one of them"
    if inner:
        return f"{path} is not a checkpoint, but may contain some: {', '.join(inner[:20])}. Give one of them"
    return (
        f"{path} cannot be imported: it has neither {SINGLE}, nor DCP's {METADATA}, nor a single .pt file. "
        "Give a directory that has one of them, or a .safetensors or .pt file"
    )


def _has_weights(path: Path) -> bool:
    return any((path / name).exists() for name in (SINGLE, INDEX, BIN_INDEX, DEEPSPEED_MODEL, *BIN_FILES))
