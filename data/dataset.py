"""A dataset folder: the shards of each split, and the tokenizer that wrote them.

`data.prepare` describes its output in `dataset.json`. In folders without one, such as downloaded FineWeb
shards, file names decide: `[prefix]train[_000001].bin` (or `.npy`) and `[prefix]val...`, with GPT-2's
vocabulary. A hand-written `{"version": 1, "tokenizer": "mine", "vocab_size": 1000}` names another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DatasetNotFoundError, ShardError
from data.shards import Shard, inspect_shard
from data.tokenizer import GPT2_VOCAB_SIZE, Gpt2Tokenizer

DESCRIPTION = "dataset.json"
DESCRIPTION_VERSION = 1
INCOMPLETE = "incomplete"
"""A file of this name marks a folder that is being written, or whose writer died."""

SPLITS = ("train", "val")
_MAX_DESCRIPTION_BYTES = 64 << 20
_SHARD_NAME = re.compile(
    r"(?!\.)(?P<family>(?:.*[_.-])?)(?P<split>" + "|".join(SPLITS) + r")(?:[_.-]?\d+)?\.(?P<kind>bin|npy)"
)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The shards of each split, sorted by name, and the vocabulary of their tokens."""

    directory: Path
    tokenizer: str
    vocab_size: int
    splits: Mapping[str, tuple[Shard, ...]]

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of `split`. Raises DatasetNotFoundError if it has none."""
        found = self.splits.get(split, ())
        if not found:
            there = ", ".join(name for name, shards in self.splits.items() if shards) or "none"
            raise DatasetNotFoundError(
                f"the dataset {self.directory} has no {split!r} split (splits: {there}); "
                f"prepare it with a --val_fraction above 0, or add {split}*.bin shards"
            )
        return found

    def tokens(self, split: str) -> int:
        """Tokens in `split`, 0 if it has no shards."""
        return sum(shard.tokens for shard in self.splits.get(split, ()))


def open_dataset(directory: str | Path) -> Dataset:
    """Find and check every shard in `directory`. Reads headers only.

    Raises DatasetNotFoundError if there is no dataset, ShardError if it is damaged.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise DatasetNotFoundError(
            f"no dataset: {folder} {kind}; `python -m data.prepare --out {folder}` prepares one from text"
        )
    if (folder / INCOMPLETE).exists():
        raise ShardError(
            f"the dataset {folder} is incomplete: its preparation was interrupted; prepare it again"
        )
    description = _read_description(folder / DESCRIPTION)
    if "splits" in description:
        splits = _described_shards(folder, description["splits"])
    else:
        splits = _named_shards(folder)
    return Dataset(
        directory=folder,
        tokenizer=description.get("tokenizer", Gpt2Tokenizer.name),
        vocab_size=description.get("vocab_size", GPT2_VOCAB_SIZE),
        splits=splits,
    )


def describe(dataset: Dataset, **extra: Any) -> bytes:
    """The bytes of `dataset.json`; they do not depend on the dataset's location."""
    splits = {
        split: {
            "tokens": dataset.tokens(split),
            "shards": [{"file": shard.name, "tokens": shard.tokens} for shard in shards],
        }
        for split, shards in dataset.splits.items()
    }
    value = {
        "version": DESCRIPTION_VERSION,
        "tokenizer": dataset.tokenizer,
        "vocab_size": dataset.vocab_size,
        **extra,
        "splits": splits,
    }
    return (json.dumps(value, indent=1) + "\n").encode()


def _read_description(path: Path) -> dict[str, Any]:
    """The parsed `dataset.json`, or {} without one."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_DESCRIPTION_BYTES)
        value = json.loads(raw)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is not valid JSON ({error}): prepare the dataset again") from error
    if not isinstance(value, dict):
        raise ShardError(f"{path} is not a JSON object: prepare the dataset again")
    if value.get("version") != DESCRIPTION_VERSION:
        raise ShardError(
            f"{path} has version {value.get('version')!r}, but this Holdfast reads {DESCRIPTION_VERSION}: "
            "update Holdfast or prepare the dataset again"
        )
    vocab_size = value.get("vocab_size")
    if not isinstance(value.get("tokenizer"), str) or type(vocab_size) is not int or vocab_size < 1:
        raise ShardError(f"{path} must name a tokenizer (a string) and a vocab_size (a positive integer)")
    return value


def _described_shards(folder: Path, splits: Any) -> dict[str, tuple[Shard, ...]]:
    found: dict[str, tuple[Shard, ...]] = {}
    try:
        listed = [
            (str(split), [(e["file"], e["tokens"]) for e in value["shards"]])
            for split, value in splits.items()
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ShardError(
            f"cannot read the list of shards in {folder / DESCRIPTION}: prepare the dataset again"
        ) from error
    for split, entries in listed:
        found[split] = tuple(_described_shard(folder, file, tokens) for file, tokens in entries)
    return found


def _described_shard(folder: Path, file: Any, tokens: Any) -> Shard:
    if not isinstance(file, str) or Path(file).name != file:
        raise ShardError(
            f"{folder / DESCRIPTION} names the shard {file!r}, which is not a plain file name"
        )
    if not (folder / file).is_file():
        raise ShardError(
            f"shard {folder / file} is missing although {DESCRIPTION} lists it: prepare the dataset again"
        )
    shard = inspect_shard(folder / file)
    if shard.tokens != tokens:
        raise ShardError(
            f"shard {shard.path} has {shard.tokens:,} tokens, but {DESCRIPTION} says {tokens!r}: prepare "
            "the dataset again"
        )
    return shard


def _named_shards(folder: Path) -> dict[str, tuple[Shard, ...]]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DatasetNotFoundError(f"cannot list {folder}: {error.strerror}") from error
    matches = [match for match in map(_SHARD_NAME.fullmatch, names) if match]
    if not matches:
        raise DatasetNotFoundError(
            f"no token shards in {folder} (looked for {DESCRIPTION}, *train*.bin, *train*.npy); "
            f"`python -m data.prepare` prepares them from text"
        )
    families = sorted({f"{match['family']}*.{match['kind']}" for match in matches})
    if len(families) > 1:
        raise ShardError(
            f"{folder} holds several datasets ({', '.join(families)}): put each into its own folder"
        )
    return {
        split: tuple(inspect_shard(folder / match.string) for match in matches if match["split"] == split)
        for split in SPLITS
    }
