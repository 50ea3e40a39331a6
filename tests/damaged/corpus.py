"""One small checkpoint per kind of damage: how to make it, and what listing and verifying say of it.

A case starts from a good checkpoint on two ranks, beside an older good one. `listed` is the status in a
listing; `sentence` begins what verification says, and what the listing says where it sees the damage at all.
`quick`: whether sizes, indexes and headers give it away without reading the blocks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.format.digest import block_digests, bytes_digest, combine
from engine.format.index import ShardIndex
from engine.format.json import canonical_bytes
from engine.format.layout import Chunk
from engine.format.manifest import FileReceipt, Manifest, TensorInfo
from tests.support.tiny_checkpoint import (
    COLUMNS,
    chunks_of,
    rewrite_index,
    rewrite_manifest,
    write_checkpoint,
)

SHARD = "shard-00001.safetensors"
INDEX = "shard-00001.json"
ROWS = 40


@dataclass(frozen=True)
class Case:
    """A kind of damage. `make` gets the good checkpoint's directory and the older one's."""

    make: Callable[[Path, Path], None]
    listed: Literal["committed", "damaged", "partial"]
    sentence: str
    quick: bool = True
    chunks: Sequence[Sequence[Chunk]] | None = None
    """What the ranks write in place of an even split."""
    restore: str | None = ""
    """What a restore says, where that is something else; None where it restores all the same: it goes by the
    index, and never looks into a header."""


def write_case(root: Path, name: str) -> tuple[str, str]:
    """Write the older good checkpoint and the damaged one of that name; returns their ids."""
    case = CASES[name]
    older = write_checkpoint(root, sequence=1, world_size=2, rows=ROWS)
    damaged = write_checkpoint(root, sequence=2, world_size=2, rows=ROWS, seed=1, chunks=case.chunks)
    case.make(root / damaged, root / older)
    return older, damaged


def nothing(directory: Path, older: Path) -> None:
    pass


def flip(name: str, at: int) -> Callable[[Path, Path], None]:
    """Flip one bit of a byte, counted from the end if negative."""

    def make(directory: Path, older: Path) -> None:
        raw = bytearray((directory / name).read_bytes())
        raw[at] ^= 1
        (directory / name).write_bytes(raw)

    return make


def truncate(name: str, file_bytes: int) -> Callable[[Path, Path], None]:
    return lambda directory, older: os.truncate(directory / name, file_bytes)


def remove(name: str) -> Callable[[Path, Path], None]:
    return lambda directory, older: (directory / name).unlink()


def take_from_older(name: str) -> Callable[[Path, Path], None]:
    def make(directory: Path, older: Path) -> None:
        (directory / name).write_bytes((older / name).read_bytes())

    return make


def append(directory: Path, older: Path) -> None:
    with open(directory / SHARD, "ab") as file:
        file.write(b"\0" * 8)


def add_foreign_shard(directory: Path, older: Path) -> None:
    (directory / "shard-00002.safetensors").write_bytes((older / SHARD).read_bytes())


def link(directory: Path, older: Path) -> None:
    (directory / SHARD).unlink()
    (directory / SHARD).symlink_to(older / SHARD)


def wipe(directory: Path, older: Path) -> None:
    path = directory / SHARD
    path.write_bytes(path.read_bytes()[:4096] + bytes(path.stat().st_size - 4096))


def edit_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, Path], None]:
    """Change the manifest's JSON and give it a digest that fits: what a careful forger would do."""

    def make(directory: Path, older: Path) -> None:
        path = directory / "manifest.json"
        document = json.loads(path.read_bytes())
        del document["digest"]
        change(document)
        digest = bytes_digest(canonical_bytes(document))
        path.write_bytes(canonical_bytes({**document, "digest": digest}))

    return make


def edit_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, Path], None]:
    """Change an index's JSON and give the manifest a receipt that fits."""

    def make(directory: Path, older: Path) -> None:
        document = json.loads((directory / INDEX).read_bytes())
        change(document)
        rewrite_index(directory, 1, canonical_bytes(document))

    return make


def respace_manifest(directory: Path, older: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))


def replace_header(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    """Change a shard's header, and the digests in index and manifest with it: only the header is wrong."""

    def make(directory: Path, older: Path) -> None:
        raw = (directory / SHARD).read_bytes()
        raw = change(raw)
        (directory / SHARD).write_bytes(raw)
        index = ShardIndex.from_bytes((directory / INDEX).read_bytes(), what=INDEX)
        digests = block_digests(raw)
        file = dataclasses.replace(index.files[0], digests=digests, digest=combine(digests))
        path = directory / "manifest.json"
        manifest = Manifest.from_bytes(path.read_bytes(), what="manifest")
        shards = list(manifest.shards)
        shards[1] = dataclasses.replace(shards[1], files=(FileReceipt(SHARD, len(raw), combine(digests)),))
        rewrite_manifest(directory, shards=tuple(shards))
        rewrite_index(directory, 1, dataclasses.replace(index, files=(file,)).to_bytes())

    return make


def rename_in_header(raw: bytes) -> bytes:
    return raw.replace(b'"model.w":{"d', b'"model.v":{"d')


def huge_header(raw: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + raw[8:]


def set_field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update({name: value})


def point_outside(document: dict[str, Any]) -> None:
    document["shards"][1]["files"][0]["file"] = "../../etc/passwd"


def enlarge_tensor(document: dict[str, Any]) -> None:
    document["tensors"]["model.w"]["shape"] = [1 << 40, 1 << 20]


def move_chunk(document: dict[str, Any]) -> None:
    for chunk in document["files"][0]["chunks"]:
        chunk["begin"] += 4096
        chunk["end"] += 4096


W = (ROWS, COLUMNS)
_EVEN = chunks_of(2, ROWS)
_BIAS = _EVEN[1][1]


def w(begin: int, end: int, dtype: str = "F32") -> Chunk:
    return Chunk("model.w", dtype, W, (begin, 0), (end - begin, COLUMNS))


_DIGEST = "[0-9a-f]{32}"
_SHORT = "[0-9a-f]{16}"


def changed(block: int, span: str) -> str:
    """What a restore says of a block of the second shard that is not as it was written."""
    found = f"its digest is {_SHORT}, not {_SHORT}"
    return rf"{SHARD}: block {block} \(bytes {span}\) has changed: {found}"


CASES: dict[str, Case] = {
    "truncated_shard": Case(truncate(SHARD, 5000), "damaged", f"{SHARD} has 5000 bytes: [0-9]+ were written"),
    "longer_shard": Case(append, "damaged", f"{SHARD} has [0-9]+ bytes: [0-9]+ were written"),
    "empty_shard": Case(truncate(SHARD, 0), "damaged", f"{SHARD} has 0 bytes: [0-9]+ were written"),
    "missing_shard": Case(
        remove(SHARD),
        "damaged",
        f"{SHARD} is missing: the manifest names it with [0-9]+ bytes",
        restore=rf"lacks a file that its manifest lists: .*{SHARD}",
    ),
    "symlink": Case(
        link,
        "damaged",
        f"{SHARD} is missing: the manifest names it with [0-9]+ bytes",
        restore=changed(0, "0 to 65,536"),
    ),
    "additional_shard": Case(
        add_foreign_shard,
        "damaged",
        r"shard-00002\.safetensors does not belong to this checkpoint: its manifest does not name it",
        restore=None,
    ),
    "foreign_shard": Case(
        take_from_older(SHARD),
        "committed",
        rf"{SHARD}: block 0 \(bytes 0 to 65536\) has changed: "
        rf"its digest is {_SHORT}, not {_SHORT}",
        quick=False,
        restore=changed(0, "0 to 65,536"),
    ),
    "flipped_bit_in_data": Case(
        flip(SHARD, -1),
        "committed",
        rf"{SHARD}: block 1 \(bytes 65536 to 86048\) has changed: "
        rf"its digest is {_SHORT}, not {_SHORT}$",
        quick=False,
        restore=changed(1, "65,536 to 86,048"),
    ),
    "flipped_bit_in_header_padding": Case(
        flip(SHARD, 4095),
        "committed",
        f"the header of {SHARD} is not valid JSON",
        restore=changed(0, "0 to 65,536"),
    ),
    "flipped_bit_in_header": Case(
        flip(SHARD, 0),
        "committed",
        f"{SHARD}|the header of {SHARD}",
        restore=changed(0, "0 to 65,536"),
    ),
    "wiped_shard": Case(
        wipe,
        "committed",
        rf"{SHARD}: block 0 \(bytes 0 to 65536\)",
        quick=False,
        restore=changed(0, "0 to 65,536"),
    ),
    "huge_declared_header": Case(
        replace_header(huge_header),
        "committed",
        f"{SHARD} declares a header of 1152921504606846976 bytes in a file of 86048",
        restore=None,
    ),
    "header_against_index": Case(
        replace_header(rename_in_header),
        "committed",
        rf"the header of {SHARD} has 'model.v' as",
        restore=None,
    ),
    "flipped_bit_in_index": Case(
        flip(INDEX, -3), "committed", rf".*{INDEX} has changed: its digest is {_DIGEST}, not {_DIGEST}$"
    ),
    "missing_index": Case(
        remove(INDEX),
        "damaged",
        f"{INDEX} is missing: the manifest names it with [0-9]+ bytes",
        restore=rf"lacks a file that its manifest lists: .*{INDEX}",
    ),
    "empty_index": Case(truncate(INDEX, 0), "damaged", f"{INDEX} has 0 bytes: [0-9]+ were written"),
    "index_not_canonical": Case(
        lambda directory, older: rewrite_index(directory, 1, (directory / INDEX).read_bytes() + b" "),
        "committed",
        rf".*{INDEX} is not in canonical form: it was changed after it was written",
    ),
    "index_of_other_rank": Case(
        edit_index(set_field("rank", 0)), "committed", rf".*{INDEX}.*is not part 0 of rank 0"
    ),
    "index_with_hole_in_file": Case(edit_index(move_chunk), "committed", rf".*{INDEX}.*{SHARD}"),
    "index_newer": Case(edit_index(set_field("format_version", 3)), "committed", "newer"),
    "duplicated_chunk": Case(
        nothing,
        "committed",
        r"'model\.w' is partly stored twice: \[0:20, 0:1024\] in shard-00000\.safetensors "
        r"overlaps \[0:20, 0:1024\] in shard-00001\.safetensors",
        chunks=[_EVEN[0], [w(0, 20), _BIAS]],
    ),
    "overlapping_chunks": Case(
        nothing,
        "committed",
        r"'model\.w' is partly stored twice: \[0:21, 0:1024\] in shard-00000\.safetensors "
        r"overlaps \[20:40, 0:1024\] in shard-00001\.safetensors",
        chunks=[[w(0, 21)], _EVEN[1]],
    ),
    "wrong_dtype": Case(
        nothing,
        "committed",
        rf"{SHARD} has 'model\.w' as I32 \[40, 1024\]: the manifest says F32 \[40, 1024\]",
        chunks=[_EVEN[0], [w(20, 40, "I32"), _BIAS]],
    ),
    "hole": Case(
        nothing,
        "committed",
        r"'model\.w' \(F32 \[40, 1024\]\) has a hole: the shards have 39936 of its 40960 elements",
        chunks=[[w(0, 19)], [*_EVEN[1], Chunk("model.extra", "F32", (COLUMNS,), (0,), (COLUMNS,))]],
    ),
    "flipped_bit_in_manifest": Case(flip("manifest.json", 30), "damaged", ".*manifest.json"),
    "empty_manifest": Case(truncate("manifest.json", 0), "damaged", r".*manifest\.json is not valid JSON"),
    "missing_manifest": Case(remove("manifest.json"), "partial", ""),
    "manifest_not_canonical": Case(respace_manifest, "damaged", r".*manifest\.json is not in canonical form"),
    "manifest_with_wrong_digest": Case(
        lambda directory, older: (directory / "manifest.json").write_bytes(
            (directory / "manifest.json").read_bytes().replace(b'"step":20', b'"step":21')
        ),
        "damaged",
        r".*manifest\.json does not match its own digest: it was changed after it was written",
    ),
    "manifest_newer": Case(edit_manifest(set_field("format_version", 3)), "damaged", "newer"),
    "manifest_of_other_checkpoint": Case(
        take_from_older("manifest.json"),
        "damaged",
        r"its manifest belongs to step-00000010-00000001|.*shard-00000\.json has changed",
    ),
    "path_escaping": Case(
        edit_manifest(point_outside), "damaged", r".*manifest\.json.*'\.\./\.\./etc/passwd' is not part 0"
    ),
    "huge_numbers": Case(
        edit_manifest(enlarge_tensor), "damaged", r".*manifest\.json.*tensors of [0-9]+ bytes in shards of"
    ),
    "unknown_field": Case(
        edit_manifest(set_field("sideload", 1)),
        "damaged",
        r".*manifest\.json has an unknown field 'sideload'",
    ),
    "tensor_renamed_in_manifest": Case(
        lambda directory, older: rewrite_manifest(
            directory, tensors={"model.w": TensorInfo("F32", W), "model.c": TensorInfo("F32", (8,))}
        ),
        "committed",
        r"'model\.c' \(F32 \[8\]\) has a hole: the shards have 0 of its 8 elements",
    ),
}
