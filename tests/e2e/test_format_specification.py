"""checkpoints/README.md is enough: a reader written from that page alone understands a real checkpoint.

Nothing of engine is imported here, so that the page, not the code, is what is tested.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors import safe_open

from tests.e2e.harness import ROOT, Run

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@pytest.fixture(scope="module")
def checkpoint(undisturbed_2: Run) -> Path:
    return Path(undisturbed_2.with_role("latest")["path"])


def canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_of(raw: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(raw)


def read_canonical(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    value: dict[str, Any] = json.loads(raw)
    assert canonical(value) == raw
    return value


def indexes(checkpoint: Path) -> list[dict[str, Any]]:
    manifest = read_canonical(checkpoint / "manifest.json")
    return [read_canonical(checkpoint / shard["index"]["file"]) for shard in manifest["shards"]]


def test_the_manifest_vouches_for_itself_and_for_every_index(checkpoint: Path) -> None:
    manifest = read_canonical(checkpoint / "manifest.json")
    own = manifest.pop("digest")
    assert digest_of(canonical(manifest)) == own
    assert manifest["id"] == checkpoint.name
    assert re.fullmatch(r"step-\d{8,}-[0-9a-f]{8}", checkpoint.name)
    assert manifest["format_version"] == 1
    assert [shard["rank"] for shard in manifest["shards"]] == list(range(manifest["world_size"]))
    for shard in manifest["shards"]:
        raw = (checkpoint / shard["index"]["file"]).read_bytes()
        assert (len(raw), digest_of(raw)) == (shard["index"]["bytes"], shard["index"]["digest"])


def test_every_block_has_its_digest(checkpoint: Path) -> None:
    receipts = [shard["files"] for shard in read_canonical(checkpoint / "manifest.json")["shards"]]
    for index, receipt in zip(indexes(checkpoint), receipts, strict=True):
        for file, said in zip(index["files"], receipt, strict=True):
            raw = (checkpoint / file["file"]).read_bytes()
            size = file["block_bytes"]
            blocks = [raw[at : at + size] for at in range(0, len(raw), size)]
            joined = b"".join(xxhash.xxh3_64_digest(block) for block in blocks)
            assert base64.b64decode(file["digests"]) == joined
            assert file["digest"] == said["digest"] == digest_of(joined)
            assert file["bytes"] == said["bytes"] == len(raw)


def test_shards_are_safetensors_without_holes_on_page_boundaries(checkpoint: Path) -> None:
    for index in indexes(checkpoint):
        for file in index["files"]:
            path = checkpoint / file["file"]
            raw = path.read_bytes()
            (length,) = struct.unpack("<Q", raw[:8])
            header = json.loads(raw[8 : 8 + length])
            offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
            position = 8 + length
            assert position % 4096 == 0
            order = []
            for chunk in file["chunks"]:
                assert chunk["begin"] == position
                position = chunk["end"]
                item = ITEM_BYTES[chunk["dtype"]]
                assert chunk["end"] - chunk["begin"] == math.prod(chunk["sizes"]) * item
                assert chunk["begin"] % item == 0
                assert header[chunk["name"]]["shape"] == chunk["sizes"]
                assert offsets[chunk["name"]]["saved_offsets"] == chunk["offsets"]
                order.append((-item, chunk["name"]))
            assert position == len(raw)
            assert order == sorted(order)
            with safe_open(path, framework="numpy") as opened:
                assert sorted(opened.keys()) == sorted(name for _, name in order)


def test_the_chunks_of_a_tensor_cover_it_once(checkpoint: Path) -> None:
    manifest = read_canonical(checkpoint / "manifest.json")
    covered = dict.fromkeys(manifest["tensors"], 0)
    for index in indexes(checkpoint):
        for file in index["files"]:
            for chunk in file["chunks"]:
                declared = manifest["tensors"][chunk["name"]]
                assert (declared["dtype"], declared["shape"]) == (chunk["dtype"], chunk["shape"])
                covered[chunk["name"]] += math.prod(chunk["sizes"])
    assert covered == {name: math.prod(info["shape"]) for name, info in manifest["tensors"].items()}


def test_the_page_names_every_key_that_there_is(checkpoint: Path) -> None:
    page = (ROOT / "checkpoints" / "README.md").read_text()
    manifest = read_canonical(checkpoint / "manifest.json")
    keys = set(manifest) | set(manifest["shards"][0]) | set(manifest["shards"][0]["index"])
    (index, *_) = indexes(checkpoint)
    keys |= set(index) | set(index["files"][0]) | set(index["files"][0]["chunks"][0])
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", page))))
    assert keys <= named, f"not on the page: {sorted(keys - named)}"
