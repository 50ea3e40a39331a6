"""Parses the command line into a TrainConfig; explicit flags override a checkpoint's configuration."""

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
    """Whether this process prints for the job: rank 0 under torchrun, or any process without torchrun."""
    return environ.get("RANK", "0") == "0"


def parse(argv: Sequence[str], default: TrainConfig | None = None, *, prog: str = PROG) -> TrainConfig:
    """Parse flags, spelled with underscores or dashes; the others keep the values of `default`.

    Raises ConfigError for an unknown flag or an invalid value. `--help` exits with 0; only rank 0 prints it.
    """
    return parse_flags(default or TrainConfig(), argv, prog=prog, error=ConfigError, speaks=is_first_rank())


def is_given(argv: Sequence[str], flag: str) -> bool:
    """Whether the command line sets a text flag, even to its default value."""
    unlikely: dict[str, Any] = {flag: "\0"}
    return bool(getattr(parse(argv, dataclasses.replace(TrainConfig(), **unlikely)), flag) != "\0")


def resolve(argv: Sequence[str], stored: Mapping[str, Any], session: TrainConfig) -> TrainConfig:
    """The configuration of a resumed run: explicit flags, then the checkpoint's, then the defaults.

    `session` is the result of the first `parse`, which found the checkpoint; its `checkpoint_dir` may differ
    from the flags. Raises ConfigError for a flag that would make it a different run.
    """
    default = from_json(stored, session)
    config = parse(argv, default)
    check_locked(config, default)
    return config
