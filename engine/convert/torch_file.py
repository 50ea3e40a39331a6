"""`--format torch`: one `.pt`, written front to back.

`torch.save` needs every tensor in memory (or mapped from a second disk). It writes an uncompressed zip file:
a pickle in which tensors are references, then one record per storage. Writing that directly takes a window of
memory, needs no scratch space, and gives correct checksums, which `torch.save` with
`torch.serialization.skip_data` and data filled in later would not.

The format follows torch/serialization.py (`_save`, `_load`) and caffe2/serialize/inline_container.h.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.state_tree import TensorRef, refs_in, torch_tree
from engine.convert.tensors import Progress, cast, ignore_progress, raw_bytes
from engine.state.tensor_format import to_torch

FILE = "checkpoint.pt"
"""Name of the file inside a target directory."""

_ROOT = "archive"
_ALIGN_BYTES = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_PADDING_ID = b"FB"  # torch's id for a padding extra field

_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
"""The classes by which a pickle names a storage's dtype. Newer dtypes have none and are named separately."""


def torch_bytes(source: CheckpointTensors, *, dtype: str | None, model_only: bool) -> int:
    """How many tensor bytes `write_torch` will write."""
    tree = torch_tree(source, dtype=dtype, model_only=model_only)
    return sum(ref.info.tensor_bytes for ref in refs_in(tree))


def write_torch(
    source: CheckpointTensors,
    path: Path,
    *,
    dtype: str | None = None,
    model_only: bool = False,
    progress: Progress = ignore_progress,
) -> None:
    """Write the new file `path` for `torch.load(path, weights_only=True)`.

    Raises: DamagedError; StorageError; OSError if the file cannot be written.
    """
    tree = torch_tree(source, dtype=dtype, model_only=model_only)
    refs = refs_in(tree)
    with open(path, "xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, "data.pkl", [_pickled(tree, refs)])
        _record(archive, ".format_version", [b"1"])
        _record(archive, ".storage_alignment", [str(_ALIGN_BYTES).encode()])
        _record(archive, "byteorder", [b"little"])
        for number, ref in enumerate(refs):
            windows = cast(source.windows(ref.name), ref.info.dtype)
            _record(archive, f"data/{number}", _counted(windows, progress))
        _record(archive, "version", [b"3\n"])


def _record(archive: zipfile.ZipFile, name: str, parts: Sequence[bytes] | Iterator[memoryview]) -> None:
    """Add a record whose data is aligned to 64 bytes, for `torch.load(mmap=True)`."""
    assert archive.fp is not None
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")  # dated 1980, so that equal checkpoints give equal files
    begin = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(info.filename) + 4 + _ZIP64_EXTRA_BYTES
    padding = -begin % _ALIGN_BYTES
    info.extra = _PADDING_ID + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as record:
        for part in parts:
            record.write(part)


def _counted(windows: Iterator[torch.Tensor], progress: Progress) -> Iterator[memoryview]:
    for window in windows:
        raw = raw_bytes(window)
        yield raw
        progress(len(raw))


def _pickled(tree: Any, refs: Sequence[TensorRef]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, refs).dump(tree)
    return buffer.getvalue()


class _Storage:
    """Represents a storage in the pickle."""

    def __init__(self, key: str, info: torch.dtype, elements: int) -> None:
        known = info in _STORAGES
        kind = _STORAGES[info] if known else torch.UntypedStorage
        self.persistent_id = ("storage", kind, key, "cpu", elements if known else elements * info.itemsize)


class _Pickler(pickle.Pickler):
    """Pickles references as `torch.save` pickles contiguous CPU tensors.

    The two functions are private by name, but every `.pt` refers to them: torch cannot move them without
    breaking its own files. The tests load the files written here.
    """

    def __init__(self, buffer: io.BytesIO, refs: Sequence[TensorRef]) -> None:
        super().__init__(buffer, protocol=2)
        self._keys = {id(ref): str(number) for number, ref in enumerate(refs)}
        self._storages: dict[str, _Storage] = {}

    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, TensorRef):
            return NotImplemented
        dtype, shape = to_torch(obj.info.dtype), obj.info.shape
        meta = torch.empty(shape, dtype=dtype, device="meta")
        key = self._keys[id(obj)]
        storage = self._storages.setdefault(key, _Storage(key, dtype, meta.numel()))
        arguments: Any = (storage, 0, tuple(shape), tuple(meta.stride()), False, collections.OrderedDict())
        if dtype in _STORAGES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, dtype)
