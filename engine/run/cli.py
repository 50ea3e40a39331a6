"""The command line: flags to TrainConfig, with a checkpoint's configuration beneath the explicit ones."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

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
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(
                TrainConfig,
                args=list(argv),
                default=default or TrainConfig(),
                use_underscores=True,
                prog=prog,
            )
    except SystemExit as exit_:
        if (refusal := _config_error(exit_)) is not None:
            raise refusal from None
        if exit_.code:
            raise ConfigError(one_sentence(err.getvalue())) from None
        if is_first_rank():
            sys.stdout.write(out.getvalue())
        raise


def gives(argv: Sequence[str], flag: str) -> bool:
    """Whether a flag with a text value was typed, even with the value that is its default."""
    unlikely: dict[str, Any] = {flag: "\0"}
    return bool(getattr(parse(argv, dataclasses.replace(TrainConfig(), **unlikely)), flag) != "\0")


def _config_error(error: BaseException | None) -> ConfigError | None:
    """The refusal that tyro turned into an exit: it draws a box around any ValueError of a constructor."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__context__
    return error


def one_sentence(box: str) -> str:
    """What tyro says in a box of many lines, in one. Its rules become semicolons, its title goes."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip("│| ")
        if text.strip("╰╯─+-"):
            parts[-1].append(text)
        else:
            parts.append([])
    return "; ".join(" ".join(part) for part in parts if part)


def resolve(argv: Sequence[str], stored: Mapping[str, Any], session: TrainConfig) -> TrainConfig:
    """The configuration of a resumed run: explicit flag, then the checkpoint's, then the default.

    `session` is the result of a first `parse`, which found the checkpoint; it may name another
    `checkpoint_dir` than the flags do. Raises ConfigError for a flag that would make it a different run.
    """
    default = from_json(stored, session)
    config = parse(argv, default)
    check_locked(config, default)
    return config
