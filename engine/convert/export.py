"""`export`: writes a committed checkpoint in a format for other tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.convert.atomic_target import staged
from engine.convert.checkpoint import CheckpointTensors
from engine.convert.dcp_directory import METADATA, dcp_bytes, write_dcp
from engine.convert.model_kinds import ModelKind, exporting_kind
from engine.convert.safetensors_out import SHARD_BYTES
from engine.convert.tensors import Progress, ignore_progress, target_dtype
from engine.convert.torch_file import FILE, torch_bytes, write_torch
from engine.errors import ConfigError
from engine.storage.base import Storage

FORMATS = ("hf", "torch", "dcp")

_FILE_SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of an export. `dtype` ("bf16", "fp16", "fp32") converts the model's floating-point tensors.

    An optimizer's state keeps its dtype. `shard_bytes`: the largest file that `hf` writes.
    """

    format: str
    dtype: str | None = None
    model_only: bool = False
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"--format is {self.format!r}: it must be one of {', '.join(FORMATS)}")
        if self.shard_bytes < 1:
            raise ConfigError(f"files of {self.shard_bytes} bytes cannot hold a tensor: give 1 byte or more")
        target_dtype(self.dtype)


def export_checkpoint(
    storage: Storage,
    name: str,
    target: str,
    options: ExportOptions,
    *,
    kinds: Sequence[ModelKind] = (),
    storage_options: Mapping[str, str] | None = None,
    on_total: Callable[[int], None] = ignore_progress,
    progress: Progress = ignore_progress,
) -> None:
    """Write the checkpoint `name` of `storage` to `target`, a path or URI that does not exist yet.

    With format "torch", a target that ends in .pt or .pth is the file itself; otherwise it is its directory.
    `hf` writes a model that one of `kinds` recognises.
    `on_total` is called with the total tensor bytes, before the first tensor is read.
    Raises: AlreadyExistsError; StateError if the format cannot store this model; ConfigError for `hf`
        without kinds; DamagedError; StorageError.
    After an error or an interruption, nothing is left at the target.
    """
    dtype, model_only = target_dtype(options.dtype), options.model_only
    with CheckpointTensors(storage, name) as source:
        if options.format == "hf":
            kind = exporting_kind(source, kinds)
            on_total(kind.hf_bytes(source, dtype))
            with staged(target, storage_options, last="config.json") as path:
                kind.write_hf(source, path, dtype=dtype, shard_bytes=options.shard_bytes, progress=progress)
        elif options.format == "dcp":
            on_total(dcp_bytes(source, dtype=dtype, model_only=model_only))
            with staged(target, storage_options, last=METADATA) as path:
                write_dcp(source, path, dtype=dtype, model_only=model_only, progress=progress)
        else:
            on_total(torch_bytes(source, dtype=dtype, model_only=model_only))
            with staged(target, storage_options) as path:
                file = path
                if not target.endswith(_FILE_SUFFIXES):
                    path.mkdir()
                    file = path / FILE
                write_torch(source, file, dtype=dtype, model_only=model_only, progress=progress)
