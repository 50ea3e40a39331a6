"""Whose an attempt is. The second half of its name begins with a tag of the run that began it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from engine.format.names import attempt_name, parse_attempt_name

_TAG_CHARS = 4


def new_attempt(step: int, run_id: str, key: str) -> str:
    """The name of an attempt of the run `run_id`. `key` is another one for each attempt of that run."""
    return attempt_name(step, _hex(run_id)[:_TAG_CHARS] + _hex(key)[: 8 - _TAG_CHARS])


def is_attempt_of(name: str, run_ids: Iterable[str]) -> bool:
    """Whether one of these runs may have begun it. One in 65,536 attempts of others looks so, too."""
    parsed = parse_attempt_name(name)
    return parsed is not None and parsed[1][:_TAG_CHARS] in {_hex(run_id)[:_TAG_CHARS] for run_id in run_ids}


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
