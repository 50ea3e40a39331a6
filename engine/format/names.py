"""The names of files and directories, and the check that a stored path is safe."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from engine.errors import HostilePathError

MANIFEST = "manifest.json"
"""The commit: a directory with this file is a checkpoint."""

ON_HOLD = "held"
"""Marks a checkpoint on hold: retention leaves it alone."""

DAMAGED = "damaged.json"
"""Marks a checkpoint that failed verification."""

TOMBSTONE = "tombstone"
"""Marks a checkpoint that is being deleted. It sorts last, so that it is deleted last."""

DEAD_PREFIX = "dead-"
"""Prefixed to an attempt's name when a later run takes over the directory."""

TMP_SUFFIX = ".tmp"
"""Suffix of an incomplete file; one that a crash left behind may be deleted."""

PROBE_PREFIX = "probe-"
"""Prefix of the file by which ranks check that they share a directory."""

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4096
_RUN_TAG_CHARS = 4

_ATTEMPT = re.compile(r"step-([0-9]{8,18})-([0-9a-f]{8})", re.ASCII)
_LEASE = re.compile(r"lease-([0-9]{8,18})", re.ASCII)
_SHARD = re.compile(r"shard-([0-9]{5,9})(?:-([1-9][0-9]{0,8}))?\.safetensors", re.ASCII)
_INDEX = re.compile(r"shard-([0-9]{5,9})\.json", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{8}", re.ASCII)


def attempt_name(step: int, attempt_hex: str) -> str:
    """The directory of one save attempt: step-00000250-1f0c9a3e. `attempt_hex`: 8 lower-case hex digits."""
    if not 0 <= step < 10**18 or not _HEX.fullmatch(attempt_hex):
        raise ValueError(f"no attempt name for step {step} and {attempt_hex!r}: give 8 hex digits")
    return f"step-{step:08d}-{attempt_hex}"


def parse_attempt_name(name: str) -> tuple[int, str] | None:
    """(step, hex) of an attempt's directory name, or None for any other name."""
    match = _ATTEMPT.fullmatch(name)
    if match is None or attempt_name(int(match[1]), match[2]) != name:
        return None
    return int(match[1]), match[2]


def new_attempt(step: int, run_id: str, key: str) -> str:
    """The name of an attempt of the run `run_id`. `key` differs for each attempt of that run.

    The hex digits begin with a tag of the run, so that a later run can tell whose attempt it is.
    """
    return attempt_name(step, _sha256(run_id)[:_RUN_TAG_CHARS] + _sha256(key)[: 8 - _RUN_TAG_CHARS])


def is_attempt_of(name: str, run_ids: Iterable[str]) -> bool:
    """Whether one of these runs may have begun it: one in 65,536 attempts of other runs matches, too."""
    parsed = parse_attempt_name(name)
    tags = {_sha256(run_id)[:_RUN_TAG_CHARS] for run_id in run_ids}
    return parsed is not None and parsed[1][:_RUN_TAG_CHARS] in tags


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def shard_file(rank: int, part: int = 0) -> str:
    """File of a rank's tensors. Parts above 0 have further chunks of names that part 0 has already."""
    return f"shard-{rank:05d}.safetensors" if part == 0 else f"shard-{rank:05d}-{part}.safetensors"


def parse_shard_file(name: str) -> tuple[int, int] | None:
    """(rank, part) of a shard file's name, or None for any other name."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return None
    rank, part = int(match[1]), int(match[2] or 0)
    return (rank, part) if shard_file(rank, part) == name else None


def index_file(rank: int) -> str:
    """File of a rank's index: chunks, block digests, rank-local values."""
    return f"shard-{rank:05d}.json"


def is_checkpoint_file(name: str) -> bool:
    """Whether this format gives that name to a file in an attempt, temporary ones included.

    Holdfast did not write files with other names, and never deletes them.
    """
    stem = name
    if name.endswith(TMP_SUFFIX):
        stem, _, random_hex = name.removesuffix(TMP_SUFFIX).rpartition(".")
        if not _HEX.fullmatch(random_hex):
            return False
    if stem in (MANIFEST, ON_HOLD, DAMAGED, TOMBSTONE) or parse_shard_file(stem) is not None:
        return True
    match = _INDEX.fullmatch(stem)
    return match is not None and index_file(int(match[1])) == stem


def lease_name(epoch: int) -> str:
    """File of the lease of that epoch; up to eight digits, names sort like epochs."""
    return f"lease-{epoch:08d}"


def parse_lease(name: str) -> int | None:
    """The epoch of a lease file's name, or None for any other name."""
    match = _LEASE.fullmatch(name)
    return int(match[1]) if match and lease_name(int(match[1])) == name else None


def safe_relative(path: str) -> str:
    """Return `path` if it is a relative path below its root, in plain names; HostilePathError otherwise.

    Refused: empty, absolute, "." and ".." and empty components, backslashes, NUL and other unprintable
    characters (a printed name must not deceive), components above 255 bytes. The storage handles symbolic
    links.
    """
    shown = ascii(path[:80])
    if not path or path.startswith("/"):
        raise HostilePathError(f"the stored path {shown} is not relative: refused")
    if "\\" in path or not path.isprintable():
        raise HostilePathError(f"the stored path {shown} has characters that no checkpoint uses: refused")
    if len(path.encode("utf-8")) > MAX_PATH_BYTES:
        raise HostilePathError(f"the stored path {shown}... is longer than {MAX_PATH_BYTES} bytes: refused")
    for component in path.split("/"):
        if component in ("", ".", ".."):
            raise HostilePathError(f"the stored path {shown} would leave the checkpoint directory: refused")
        if len(component.encode("utf-8")) > MAX_NAME_BYTES:
            raise HostilePathError(f"the stored path {shown}... has a name over {MAX_NAME_BYTES} bytes")
    return path


def safe_name(name: str) -> str:
    """Like `safe_relative`, for a single file name."""
    if "/" in safe_relative(name):
        raise HostilePathError(f"the stored name {name[:80]!a} is a path, not a file name: refused")
    return name
