"""Identifies a file by its bytes: its name may be wrong, and a download may be something else."""

from __future__ import annotations

import json
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import ConfigError

Format = Literal["safetensors", "torch", "pickle", "other"]

_HEAD_BYTES = 2048
_MAX_JSON_BYTES = 64 << 20
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number of torch.save before torch 1.6, after the pickle's protocol."""

_AGAIN = "the download failed: look at the file, then download the checkpoint again"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer instead of the file",
        "`git lfs pull` in its repository fetches the file itself",
    ),
    (b"\x1f\x8b", "a gzip file", "unpack it first (gunzip)"),
    (b"BZh", "a bzip2 file", "unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it first (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)", "save the weights with torch or as safetensors"),
    (b"\x93NUMPY", "a NumPy array", "save the weights with torch or as safetensors"),
    (b"GGUF", "a GGUF file (llama.cpp)", "import the model that it was converted from"),
    (b"SQLite format 3\x00", "an SQLite database", "give the checkpoint itself"),
    (b"%PDF-", "a PDF document", _AGAIN),
    (b"\x7fELF", "a compiled program", _AGAIN),
    (b"\x89PNG", "a picture (PNG)", _AGAIN),
    (b"\xff\xd8\xff", "a picture (JPEG)", _AGAIN),
)


@dataclass(frozen=True, slots=True)
class FileKind:
    """A file's format; a description with an article; what to do if it is not a checkpoint."""

    format: Format
    words: str
    advice: str = ""


def file_kind(path: Path) -> FileKind:
    """Inspect a file's first bytes, and the names in a zip file. OSError if it cannot be read."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        is_folder = stat.S_ISDIR(status.st_mode)
        words = "a directory, not a file" if is_folder else "a pipe, a socket or a device, not a file"
        raise ConfigError(f"{path} is {words}: give a safetensors file, or one that torch.save wrote")
    size = status.st_size
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return FileKind(
            "other", "an empty file", "its writing was interrupted: write or download it again"
        )
    # First, because its leading length may look like any magic number, while no other format looks like it.
    if _is_safetensors(head, size):
        return FileKind("safetensors", "a safetensors file")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _zip_kind(path, head)
    if head[:1] == b"\x80" and _LEGACY_TORCH in head[:32]:
        return FileKind("torch", "a file that torch.save wrote")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return FileKind("pickle", "a pickle that torch.save did not write")
    for magic, words, advice in _MAGIC:
        if head.startswith(magic):
            return FileKind("other", words, advice)
    if head[257:262] == b"ustar":
        return FileKind("other", "a tar archive", "unpack it first (tar -xf)")
    return _text_kind(path, head, size) or FileKind(
        "other",
        f"a file of unknown format (it begins with {head[:8].hex(' ')})",
        "give a safetensors file, or one that torch.save wrote",
    )


def refuse_other(path: Path, kind: FileKind) -> None:
    """Raises ConfigError if the file is not a checkpoint, with what it is and what to do."""
    if kind.format == "other":
        raise ConfigError(f"{path} is {kind.words}, not a checkpoint: {kind.advice}")


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return 2 <= length <= size - 8 and head[8:9] == b"{"


def _zip_kind(path: Path, head: bytes) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:  # truncated, but its first record has a name
        names = [head[30 : 30 + int.from_bytes(head[26:28], "little")].decode("utf-8", "replace")]
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return FileKind(
            "other",
            "a TorchScript program (torch.jit.save)",
            "load it with torch.jit.load, torch.save its state_dict(), and import that",
        )
    if "data.pkl" in inner:
        return FileKind("torch", "a file that torch.save wrote")
    if names and all(name.endswith(".npy") for name in names):
        return FileKind("other", "a NumPy archive (.npz)", "save the weights with torch or as safetensors")
    return FileKind("other", "a zip archive that torch.save did not write", "unpack it first (unzip)")


def _text_kind(path: Path, head: bytes, size: int) -> FileKind | None:
    try:
        text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "strict" if size <= len(head) else "ignore")
    except UnicodeDecodeError:
        return None
    if any(not c.isprintable() and not c.isspace() for c in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html")) or (start.startswith("<") and "<html" in start):
        return FileKind("other", "a web page (HTML)", _AGAIN)
    if start.startswith(("<?xml", "<error")):
        return FileKind("other", "an XML document, perhaps an object store's error message", _AGAIN)
    if start.startswith(("{", "[")) and _parses(path, size):
        index = '"weight_map"' in text
        advice = "it lists which file holds which tensor; give its directory" if index else "give the weights"
        return FileKind("other", "JSON text", advice)
    return FileKind("other", "text", "give a safetensors file, or one that torch.save wrote")


def _parses(path: Path, size: int) -> bool:
    if size > _MAX_JSON_BYTES:
        return False
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True
