"""Opens other tools' safetensors: a file, or a directory with one file, or with several and an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.convert.file_kinds import file_kind, refuse_other
from engine.convert.safetensors_out import INDEX, SINGLE
from engine.convert.state_tree import TensorRef
from engine.convert.tensors import row_spans
from engine.errors import ConfigError, DamagedError, StateError
from engine.format.element_types import ITEMSIZES
from engine.format.json import parse_bounded
from engine.format.layout import HeaderEntry, header_bytes, parse_header
from engine.format.manifest import TensorInfo
from engine.format.names import safe_name
from engine.state.tensor_format import to_torch

_FIRST_BYTES = 8
_MAX_JSON_BYTES = 64 << 20


class SafetensorsFiles:
    """The tensors of several files, by name."""

    def __init__(self, files: list[Path]) -> None:
        self._entries: dict[str, tuple[Path, HeaderEntry]] = {}
        self.shared: dict[str, str] = {}
        """Omitted name of a tied weight -> the kept name, as save_model records them."""
        for file in files:
            header, metadata = _read_header(file)
            self.shared |= metadata
            for name, entry in header.items():
                if name in self._entries:
                    raise DamagedError(f"{file} and {self._entries[name][0]} both hold a tensor {name!r}")
                self._entries[name] = file, entry
        self._infos = {name: TensorInfo(e.dtype, e.sizes) for name, (_, e) in self._entries.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def windows(self, name: str) -> Iterator[torch.Tensor]:
        """See `TensorSource`."""
        file, entry = self._entries[name]
        dtype = to_torch(entry.dtype)
        with open(file, "rb") as opened:
            opened.seek(entry.begin)
            for begin, end in row_spans(entry.sizes, dtype.itemsize):
                sizes = (end - begin, *entry.sizes[1:]) if entry.sizes else ()
                out = torch.empty(sizes, dtype=dtype)
                raw = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                if opened.readinto(raw) != len(raw):
                    raise DamagedError(f"{file} is truncated: it ends inside {name}")
                yield out


def open_safetensors(path: Path) -> tuple[dict[str, Any], SafetensorsFiles]:
    """(tree, tensors) of a file or directory; `config` comes from the `config.json` beside it.

    Raises: ConfigError if a file is not a safetensors file; DamagedError; OSError.
    """
    folder = path if path.is_dir() else path.parent
    files, wanted = _files(path)
    tensors = SafetensorsFiles(files)
    refuse_lacking(wanted - tensors.infos.keys(), folder)
    config = folder / "config.json"
    refs = {name: TensorRef(name, info) for name, info in tensors.infos.items()}
    tied = {name: refs[kept] for name, kept in tensors.shared.items() if kept in refs and name not in refs}
    return {"model": refs | tied, "config": read_json(config) if config.exists() else {}}, tensors


def files_of_index(index: Path) -> tuple[list[Path], set[str]]:
    """(the files, the tensors) in a Hugging Face index. DamagedError; OSError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DamagedError(f"{index} does not say which file holds which tensor")
    files = [index.parent / safe_name(file) for file in sorted(set(weight_map.values()))]
    lacking = [file.name for file in files if not file.exists()]
    if lacking:
        raise DamagedError(
            f"{index.parent} lacks {len(lacking)} of the {len(files)} files that {index.name} lists, "
            f"{lacking[0]} first: copy or download them, too"
        )
    return files, set(weight_map)


def refuse_lacking(names: set[str], folder: Path) -> None:
    """Raises DamagedError for tensors that an index lists and no file has."""
    if names:
        raise DamagedError(
            f"{folder} lacks {len(names)} of the tensors that its index lists, {min(names)!r} first"
        )


def _files(path: Path) -> tuple[list[Path], set[str]]:
    """(the files, the tensors that an index says they hold)."""
    if not path.is_dir():
        return [path], set()
    if (path / SINGLE).exists():
        return [path / SINGLE], set()
    if not (path / INDEX).exists():
        return sorted(path.glob("*.safetensors")), set()
    return files_of_index(path / INDEX)


def _read_header(file: Path) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """(the tensors, the file's metadata)."""
    kind = file_kind(file)
    refuse_other(file, kind)
    if kind.format != "safetensors":
        # Not read anyway: torch.load itself goes by the name.
        raise ConfigError(f"{file} is {kind.words}, despite its name: give it a name that ends in .pt")
    size = file.stat().st_size
    with open(file, "rb") as opened:
        first = opened.read(_FIRST_BYTES)
        raw = first + opened.read(header_bytes(first, size, what=str(file)) - _FIRST_BYTES)
    header = _plain_header(raw)
    _refuse_unheld(header, file)
    entries = parse_header(raw, size, what=str(file))
    metadata = header.get("__metadata__", {})
    return entries, metadata if isinstance(metadata, dict) else {}


def _plain_header(raw: bytes) -> dict[str, Any]:
    """The header as JSON, or {} if it is not JSON; `parse_header` reports that."""
    try:
        header = json.loads(raw[_FIRST_BYTES:])
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def _is_tensor(name: str, entry: Any) -> bool:
    return name != "__metadata__" and isinstance(entry, dict)


def _refuse_unheld(header: dict[str, Any], file: Path) -> None:
    """Raises StateError with every tensor whose element type a checkpoint cannot store."""
    types = {name: entry.get("dtype") for name, entry in header.items() if _is_tensor(name, entry)}
    unheld = [
        f"{name} ({kind})" for name, kind in types.items() if isinstance(kind, str) and kind not in ITEMSIZES
    ]
    if unheld:
        raise StateError(
            f"{file} has tensors of element types that a checkpoint cannot store: {', '.join(unheld)}. "
            "Convert them with the tool that wrote it"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object. DamagedError if it is not one; ConfigError if it is another kind of
    file; OSError.
    """
    try:
        found = parse_bounded(file.read_bytes(), what=str(file), max_bytes=_MAX_JSON_BYTES, constants=True)
    except DamagedError:
        kind = file_kind(file)
        if kind.format != "other" or kind.words in ("text", "JSON text"):
            raise
        raise ConfigError(f"{file} is {kind.words}, not JSON: {kind.advice}") from None
    if not isinstance(found, dict):
        raise DamagedError(f"{file} is not a JSON object")
    return found
