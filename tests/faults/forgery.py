"""Attacks on a valid checkpoint: bytes changed blindly, and JSON changed by someone who knows the format."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from engine.format.digest import block_digests, bytes_digest, combine, pack
from engine.format.json import MAX_DEPTH, canonical_bytes

NASTY: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    10**30,
    1.5,
    1e308,
    "",
    "nan",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a\x00b",
    "x" * 5000,
    "\u202eexe",
    "step-00000007-00000000",
    "F32",
    "F64",
    [],
    {},
    [[]],
    [0, -1],
    [2**40, 2**40],
    {"a": {"b": {}}},
]

DEEP = (MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1)
"""Levels of the lists that are put into a document: some fit, some go beyond what the engine reads."""


@dataclass(frozen=True)
class Original:
    """A checkpoint's files, by name."""

    id: str
    files: dict[str, bytes]

    @classmethod
    def read(cls, directory: Path) -> Original:
        return cls(directory.name, {path.name: path.read_bytes() for path in directory.iterdir()})

    def write(self, root: Path, files: dict[str, bytes]) -> None:
        folder = root / self.id
        folder.mkdir(parents=True)
        for name, raw in files.items():
            (folder / name).write_bytes(raw)

    def refit(self, files: dict[str, bytes]) -> dict[str, bytes]:
        """Receipts of the manifest that fit the files again, where it still parses: a careful forger."""
        fitted = dict(files)
        for name in sorted(files):
            if name.endswith(".safetensors"):
                _refit_index(fitted, name)
        try:
            manifest = json.loads(fitted["manifest.json"])
            for shard in manifest["shards"]:
                for receipt in (*shard["files"], shard["index"]):
                    raw = fitted[receipt["file"]]
                    receipt["bytes"] = len(raw)
                    receipt["digest"] = (
                        bytes_digest(raw)
                        if receipt["file"].endswith(".json")
                        else combine(block_digests(raw))
                    )
            fitted["manifest.json"] = signed(manifest)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        return fitted


def _refit_index(files: dict[str, bytes], shard: str) -> None:
    index = shard.replace(".safetensors", ".json")
    try:
        document = json.loads(files[index])
        for file in document["files"]:
            if file["file"] == shard:
                digests = block_digests(files[shard])
                file.update(digests=pack(digests), digest=combine(digests))
        files[index] = canonical_bytes(document)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass


def scramble(raw: bytes, dice: Random) -> bytes:
    """Change bytes blindly: flip, cut, insert, repeat, zero. Never returns the same bytes."""
    data = bytearray(raw)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(max(1, len(data)))
        match dice.randrange(5):
            case 0 if data:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 9)))
            case 3:
                data[at:at] = data[at : at + dice.randint(1, 64)]
            case _:
                data[at : at + 16] = bytes(len(data[at : at + 16]))
    return bytes(data) if bytes(data) != raw else raw + b"\x00"


def forge(original: Original, name: str, dice: Random) -> bytes:
    """Change a value of the file's JSON, and keep the file consistent with itself."""
    raw = original.files[name]
    if name.endswith(".safetensors"):
        (length,) = struct.unpack_from("<Q", raw)
        header = json.dumps(mutated(json.loads(raw[8 : 8 + length]), dice)).encode()
        claimed = dice.choice([len(header), len(header), 0, 2**62, 2**64 - 1, len(raw)])
        return struct.pack("<Q", claimed) + header + raw[8 + length :]
    document = mutated(json.loads(raw), dice)
    try:
        return signed(document) if name == "manifest.json" else canonical_bytes(document)
    except ValueError:  # an integer that our own writer refuses
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def signed(document: Any) -> bytes:
    """The manifest with a digest that fits."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return canonical_bytes({**rest, "digest": bytes_digest(canonical_bytes(rest))})


def mutated(document: Any, dice: Random) -> Any:
    """One to three values anywhere in it replaced, removed, doubled or renamed.

    What goes in is always a copy: NASTY must stay as it is from one document to the next.
    """
    for _ in range(dice.randint(1, 3)):
        places = list(_places(document))
        parent, key = dice.choice(places)
        match dice.randrange(9):
            case 0 | 1 | 2 | 3:
                parent[key] = copy.deepcopy(dice.choice(NASTY))
            case 4 | 5:
                del parent[key]
            case 6:
                parent[key] = nested(dice.choice(DEEP))
            case _ if isinstance(parent, dict):
                parent[str(dice.choice(["", "../x", "a" * 300, str(key) + "2"]))] = copy.deepcopy(parent[key])
            case _:
                parent.insert(key, copy.deepcopy(parent[key]))
        if not document:
            return document
    return document


def nested(levels: int) -> list[Any]:
    """Lists within lists, that many levels of them."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in it. Not recursive: what is searched may be deep."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                yield value, key
                waiting.append(value[key])
