"""What can be wrong with a checkpoint's files, said in one sentence each. Pure comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.format.manifest import FileReceipt, Manifest
from engine.format.names import index_file, parse_shard_file


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as it was written. `block` counts a file's digest blocks from 0, or is None."""

    file: str
    block: int | None
    expected: str
    found: str
    sentence: str


def receipts(manifest: Manifest) -> Iterator[FileReceipt]:
    """Every file that the manifest vouches for: each rank's shard files, then its index."""
    for shard in manifest.shards:
        yield from shard.files
        yield shard.index


def size_damage(manifest: Manifest, files: Mapping[str, int | None]) -> list[Damage]:
    """Compare a checkpoint directory's files (name -> bytes) with the manifest's receipts.

    Shards that no receipt names count as damage too: other safetensors readers take every shard in the
    directory for part of the checkpoint.
    """
    found = []
    expected_names = set()
    for receipt in receipts(manifest):
        expected_names.add(receipt.file)
        size = files.get(receipt.file)
        if size is None:
            sentence = f"{receipt.file} is missing: the manifest names it with {receipt.bytes} bytes"
            found.append(Damage(receipt.file, None, f"{receipt.bytes} bytes", "no file", sentence))
        elif size != receipt.bytes:
            sentence = f"{receipt.file} has {size} bytes: {receipt.bytes} were written"
            found.append(Damage(receipt.file, None, f"{receipt.bytes} bytes", f"{size} bytes", sentence))
    for name in sorted(set(files) - expected_names):
        shard = parse_shard_file(name)
        if shard is not None or name == _index_of(name):
            sentence = f"{name} does not belong to this checkpoint: its manifest does not name it"
            found.append(Damage(name, None, "no file", f"{files[name]} bytes", sentence))
    return found


def _index_of(name: str) -> str | None:
    digits = name.removeprefix("shard-").removesuffix(".json")
    return index_file(int(digits)) if digits.isascii() and digits.isdigit() else None
