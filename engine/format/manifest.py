"""The manifest: the file whose presence makes a directory a checkpoint.

Its size is O(tensors + ranks): the chunk lists are in the shard indexes. Its key "digest" is the digest of
the canonical bytes of everything else. So a manifest verifies itself and, through its receipts, every other
file. The frame (canonical JSON, "format_version", "digest") stays the same in newer formats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import DamagedError
from engine.format import digest
from engine.format.best import DEFAULT, BestRule
from engine.format.element_types import ITEMSIZES
from engine.format.fields import Fields, are_extents, validated
from engine.format.forms import version_needed
from engine.format.index import MAX_WORLD_SIZE, check_version
from engine.format.json import canonical_bytes, decode_metric, encode_metric, parse_canonical
from engine.format.layout import MAX_DIMS, check_tensor
from engine.format.names import index_file, parse_attempt_name, shard_file

REASONS = ("interval", "epoch", "best", "signal", "final", "manual", "import", "merge")
"""Why a checkpoint was taken; one may have several."""

BEST_VERSION = 2
"""The format version that introduced the field `best`."""

_TENSOR_KEYS = {"dtype", "shape"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's safetensors dtype and global shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def tensor_bytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileReceipt:
    """A file as its writer reported it: its size and digest (of a shard: over its block digests)."""

    file: str
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class ShardReceipt:
    """The files that one rank wrote: its shard files, parts 0, 1, ..., and its index."""

    rank: int
    files: tuple[FileReceipt, ...]
    index: FileReceipt

    def __post_init__(self) -> None:
        if self.index.file != index_file(self.rank):
            raise ValueError(f"{self.index.file[:80]!r} is not the index of rank {self.rank}")
        for part, receipt in enumerate(self.files):
            if receipt.file != shard_file(self.rank, part):
                raise ValueError(f"{receipt.file[:80]!r} is not part {part} of rank {self.rank}")

    @property
    def total_bytes(self) -> int:
        """Bytes of all files of the rank, the index included."""
        return self.index.bytes + sum(receipt.bytes for receipt in self.files)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One committed checkpoint.

    id          name of the attempt directory
    sequence    commit number in this directory, one above the highest before it; orders checkpoints
    parent      id that the run had restored or committed before, or None (lineage)
    parents     ids that were merged into this one
    tokens      training tokens seen; `created` is Unix time in seconds
    metrics     by name; non-finite values are allowed, but never best
    mesh        e.g. {"names": ["dp"], "shape": [4]}
    tensors     by name; `aliases` are further names of them (tied weights)
    objects     JSON values that all ranks share, by state key; `config` is the training configuration
    shards      one receipt per rank, in rank order
    best        how the run decides which checkpoint is best; format version 2 unless the default
    """

    id: str
    sequence: int
    step: int
    world_size: int
    shards: tuple[ShardReceipt, ...]
    tensors: Mapping[str, TensorInfo]
    created: float
    reasons: tuple[str, ...] = ("manual",)
    epoch: int = 0
    tokens: int = 0
    parent: str | None = None
    parents: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    mesh: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    best: BestRule = DEFAULT

    def __post_init__(self) -> None:
        self._check_identity()
        self._check_shards()
        self._check_tensors()

    @property
    def total_bytes(self) -> int:
        """Bytes of all shard files and indexes, without the manifest."""
        return sum(shard.total_bytes for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Canonical JSON with the manifest's own digest. ValueError names a value that is not JSON."""
        document = self._to_json()
        return canonical_bytes({**document, "digest": digest.bytes_digest(canonical_bytes(document))})

    @classmethod
    def from_bytes(cls, raw: bytes, *, what: str) -> Manifest:
        """Parse and validate; `what` names the document in errors.

        DamagedError unless the digest matches and all fields agree; NewerFormatError for a newer format. The
        caller compares the files' sizes with the receipts.
        """
        fields = Fields(parse_canonical(raw, what=what), what)
        own_digest = fields.digest("digest")
        # Canonical bytes stay canonical without one key. The same text inside a value would not match.
        rest = raw.replace(f'"digest":"{own_digest}",'.encode(), b"", 1)
        if digest.bytes_digest(rest) != own_digest:
            raise DamagedError(f"{what} does not match its own digest: it was changed after it was written")
        check_version(fields)
        values = _values_from_json(fields)
        fields.finish()
        return validated(what, lambda: cls(**values))

    def _to_json(self) -> dict[str, Any]:
        version = version_needed(dict(self.objects), dtypes={info.dtype for info in self.tensors.values()})
        best = {} if self.best == DEFAULT else {"best": self.best.to_json()}
        return {
            **best,
            "format_version": max(version, BEST_VERSION) if best else version,
            "id": self.id,
            "sequence": self.sequence,
            "step": self.step,
            "epoch": self.epoch,
            "tokens": self.tokens,
            "created": self.created,
            "reasons": list(self.reasons),
            "parent": self.parent,
            "parents": list(self.parents),
            "metrics": {name: encode_metric(value) for name, value in self.metrics.items()},
            "world_size": self.world_size,
            "mesh": dict(self.mesh),
            "tensors": {
                name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in self.tensors.items()
            },
            "aliases": dict(self.aliases),
            "objects": dict(self.objects),
            "config": dict(self.config),
            "software": dict(self.software),
            "shards": [
                {
                    "rank": shard.rank,
                    "files": [_receipt_to_json(receipt) for receipt in shard.files],
                    "index": _receipt_to_json(shard.index),
                }
                for shard in self.shards
            ],
        }

    def _check_identity(self) -> None:
        named = parse_attempt_name(self.id)
        if named is None or named[0] != self.step:
            raise ValueError(f"the id {self.id[:80]!r} is not an attempt at step {self.step}")
        if min(self.sequence, self.epoch, self.tokens) < 0 or not math.isfinite(self.created):
            raise ValueError(
                f"sequence {self.sequence}, epoch {self.epoch}, tokens {self.tokens}, created {self.created}:"
                " none may be negative or infinite"
            )
        ancestors = (*self.parents, *([] if self.parent is None else [self.parent]))
        for ancestor in ancestors:
            if parse_attempt_name(ancestor) is None:
                raise ValueError(f"the parent {ancestor[:80]!r} is not an attempt's name")
        unknown = set(self.reasons) - set(REASONS)
        if unknown or not self.reasons or len(set(self.reasons)) != len(self.reasons):
            given = str(self.reasons)[:200]
            raise ValueError(f"reasons {given}: one or more of {', '.join(REASONS)} are needed, each once")

    def _check_shards(self) -> None:
        if not 0 < self.world_size <= MAX_WORLD_SIZE or len(self.shards) != self.world_size:
            raise ValueError(f"{len(self.shards)} shards for a world size of {self.world_size}")
        for rank, shard in enumerate(self.shards):
            if shard.rank != rank:
                raise ValueError(f"the shard of rank {shard.rank} is at position {rank}")

    def _check_tensors(self) -> None:
        for name, info in self.tensors.items():
            check_tensor(name, info.dtype, info.shape)
        for alias, name in self.aliases.items():
            if alias in self.tensors or name not in self.tensors:
                raise ValueError(f"the alias {alias[:80]!r} of {name[:80]!r} does not name a tensor")
        needed_bytes = sum(info.tensor_bytes for info in self.tensors.values())
        stored_bytes = sum(receipt.bytes for shard in self.shards for receipt in shard.files)
        if needed_bytes > stored_bytes:  # otherwise a small file could make a reader allocate any amount
            raise ValueError(f"tensors of {needed_bytes} bytes in shards of {stored_bytes}")


def _values_from_json(fields: Fields) -> dict[str, Any]:
    """The constructor's arguments, each of the right type; the constructor checks across fields."""
    what = fields.what
    parent = fields.take("parent")
    if parent is not None and not isinstance(parent, str):
        raise fields.wrong("parent", parent, "an id or null")
    return {
        "id": fields.text("id"),
        "sequence": fields.integer("sequence"),
        "step": fields.integer("step"),
        "epoch": fields.integer("epoch"),
        "tokens": fields.integer("tokens"),
        "created": fields.number("created"),
        "reasons": fields.texts("reasons"),
        "parent": parent,
        "parents": fields.texts("parents"),
        "metrics": validated(
            what, lambda: {name: decode_metric(value) for name, value in fields.mapping("metrics").items()}
        ),
        "world_size": fields.integer("world_size"),
        "mesh": fields.mapping("mesh"),
        "tensors": {
            name: _tensor_from_json(name, value, what) for name, value in fields.mapping("tensors").items()
        },
        "aliases": _texts_by_name(fields, "aliases"),
        "objects": fields.mapping("objects"),
        "config": fields.mapping("config"),
        "software": _texts_by_name(fields, "software"),
        "best": _best_from_json(fields) if fields.has("best") else DEFAULT,
        "shards": tuple(
            _shard_from_json(Fields(shard, f"{what}, in its shards,")) for shard in fields.array("shards")
        ),
    }


def _best_from_json(fields: Fields) -> BestRule:
    inner = Fields(fields.mapping("best"), f"{fields.what}, at its best,")
    metric, mode = inner.text("metric"), inner.text("mode")
    inner.finish()
    return validated(inner.what, lambda: BestRule(metric, mode))  # type: ignore[arg-type]


def _texts_by_name(fields: Fields, name: str) -> dict[str, str]:
    value = fields.mapping(name)
    if not all(isinstance(item, str) for item in value.values()):
        raise fields.wrong(name, value, "an object of text")
    return value


def _tensor_from_json(name: str, value: Any, what: str) -> TensorInfo:
    # Hundreds in each manifest, and listing reads every manifest: slow `Fields` only for one that is wrong.
    if isinstance(value, dict) and value.keys() == _TENSOR_KEYS:
        dtype, shape = value["dtype"], value["shape"]
        is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMS and are_extents(shape)
        if is_shape and isinstance(dtype, str):
            return TensorInfo(dtype, tuple(shape))
    fields = Fields(value, f"{what}, at tensor {name[:80]!r},")
    info = TensorInfo(fields.text("dtype"), fields.integers("shape", most_items=MAX_DIMS))
    fields.finish()
    return info


def _shard_from_json(fields: Fields) -> ShardReceipt:
    rank = fields.integer("rank")
    files = tuple(
        _receipt_from_json(Fields(value, f"{fields.what} a file")) for value in fields.array("files")
    )
    index = _receipt_from_json(Fields(fields.mapping("index"), f"{fields.what} an index"))
    fields.finish()
    return validated(fields.what, lambda: ShardReceipt(rank, files, index))


def _receipt_to_json(receipt: FileReceipt) -> dict[str, Any]:
    return {"file": receipt.file, "bytes": receipt.bytes, "digest": receipt.digest}


def _receipt_from_json(fields: Fields) -> FileReceipt:
    receipt = FileReceipt(fields.text("file"), fields.integer("bytes"), fields.digest("digest"))
    fields.finish()
    return receipt
