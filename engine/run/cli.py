"""The command line: flags to TrainConfig, with a checkpoint's configuration beneath the explicit ones."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from data.flags import parse_flags
from engine.errors import ConfigError
from engine.run.config import TrainConfig, check_locked, from_json

PROG = "python -m engine.train"


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for the job: rank 0 of torchrun, or a process without it."""
    return environ.get("RANK", "0") == "0"


def parse(argv: Sequence[str], default: TrainConfig | None = None, *, prog: str = PROG) -> TrainConfig:
    """Flags, spelled with underscores or dashes, over `default`.

    Raises ConfigError for a flag that does not exist and for a value that cannot work; exits with 0 after
    `--help`, with text from rank 0 only.
    """
    return parse_flags(default or TrainConfig(), argv, prog=prog, error=ConfigError, speaks=is_first_rank())


def gives(argv: Sequence[str], flag: str) -> bool:
    """Whether a flag with a text value was typed, even with the value that is its default."""
    unlikely: dict[str, Any] = {flag: "\0"}
    return bool(getattr(parse(argv, dataclasses.replace(TrainConfig(), **unlikely)), flag) != "\0")


def resolve(argv: Sequence[str], stored: Mapping[str, Any], session: TrainConfig) -> TrainConfig:
    """The configuration of a resumed run: explicit flag, then the checkpoint's, then the default.

    `session` is the result of a first `parse`, which found the checkpoint; it may name another
    `checkpoint_dir` than the flags do. Raises ConfigError for a flag that would make it a different run.
    """
    default = from_json(stored, session)
    config = parse(argv, default)
    check_locked(config, default)
    return config
