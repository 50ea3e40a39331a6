"""Selectors ("latest", "best", "epoch:3", ...): parse one, and choose among the committed checkpoints. Pure.

No pointer files that could go stale: every answer is computed from the committed records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.directory.record import CheckpointRecord
from engine.directory.retention import (
    best_first,
    by_sequence,
    closes_epoch,
    metrics_in_words,
    metrics_of,
    roles,
    rule_of,
)
from engine.errors import SelectorError
from engine.format.best import DEFAULT, BestRule
from engine.format.names import parse_attempt_name

Kind = Literal["latest", "backup", "best", "epoch", "step", "id", "path"]

FORMS = (
    "latest, backup, best, epoch:N, step:N, best:METRIC:min, best:METRIC:max, a checkpoint's id, or a path "
    "or URI of one (with a slash)"
)

_NUMBERED = re.compile(r"(epoch|step):([0-9]{1,18})", re.ASCII)
_BEST = re.compile(r"best:(.+):(min|max)", re.ASCII)
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector. `number` is set for epoch and step only; `text` is the user's input.

    `rule`: how to decide which is best; None: as the run that wrote the newest checkpoint does.
    """

    kind: Kind
    text: str
    number: int = 0
    rule: BestRule | None = None


def parse_selector(text: str) -> Selector:
    """Parse a selector. SelectorError if it is invalid; `choose` tells whether a checkpoint matches."""
    text = text.strip()
    match text:
        case "latest" | "backup" | "best":
            return Selector(text, text)
    if numbered := _NUMBERED.fullmatch(text):
        return Selector("epoch" if numbered[1] == "epoch" else "step", text, int(numbered[2]))
    if (best := _BEST.fullmatch(text)) and best[1].isprintable():
        return Selector("best", text, rule=BestRule(best[1], "min" if best[2] == "min" else "max"))
    if parse_attempt_name(text) is not None:
        return Selector("id", text)
    if "/" in text or text in (".", ".."):
        return Selector("path", text)
    raise SelectorError(f"{text!r} is not a selector: use {FORMS}")


def apply_best_rule(text: str, rule: BestRule) -> str:
    """Replace `best` by the run's own rule, unless that is the default; other selectors stay unchanged.

    With the default, the rule stored in the checkpoints decides.
    """
    return rule.selector if rule != DEFAULT and text.strip() == "best" else text


def choose(records: Sequence[CheckpointRecord], selector: Selector) -> CheckpointRecord:
    """The committed record that the selector selects. If there is none, SelectorError lists what there is."""
    ordered = by_sequence(records)
    found = _FINDERS[selector.kind](ordered, selector)
    if found is None:
        why = _missing(selector, ordered)
        raise SelectorError(f"no checkpoint matches {selector.text!r}: {why}. {describe(ordered)}")
    return found


def describe(records: Sequence[CheckpointRecord]) -> str:
    """A sentence that lists the checkpoints, newest first, for error messages."""
    if not records:
        return "There is no committed checkpoint"
    serving = roles(records)
    newest = list(reversed(by_sequence(records)))
    shown = [_one(record, serving[record.id]) for record in newest[:_SHOWN]]
    more = f" and {len(newest) - _SHOWN} older ones" if len(newest) > _SHOWN else ""
    return f"Available: {'; '.join(shown)}{more}"


def _one(record: CheckpointRecord, serving: tuple[str, ...]) -> str:
    names = [f"epoch:{record.epoch}" if role == "epoch" else role for role in serving if role != "rolling"]
    return f"step:{record.step}" + (f" ({', '.join(names)})" if names else "")


def _no_best(records: Sequence[CheckpointRecord], selector: Selector) -> str:
    metric, others = (selector.rule or rule_of(records)).metric, metrics_of(records)
    there = metrics_in_words(records)
    more = f"; ask for best:{others[0]}:min or best:{others[0]}:max" if others else ""
    return f"none has a finite {metric}" + (f" ({there}{more})" if records else "")


def _missing(selector: Selector, records: Sequence[CheckpointRecord]) -> str:
    return {
        "latest": "nothing was committed",
        "backup": "backup is the one before the latest, and there are fewer than two",
        "best": _no_best(records, selector),
        "epoch": f"no checkpoint closed epoch {selector.number}",
        "step": f"no checkpoint at step {selector.number}",
        "id": "no checkpoint has this id",
        "path": "no checkpoint at this path",
    }[selector.kind]


def _newest(records: Sequence[CheckpointRecord]) -> CheckpointRecord | None:
    return records[-1] if records else None


def _find_path(records: Sequence[CheckpointRecord], selector: Selector) -> CheckpointRecord | None:
    path = selector.text.rstrip("/")
    return _newest([record for record in records if record.path.rstrip("/") == path])


_Finder = Callable[[Sequence[CheckpointRecord], Selector], "CheckpointRecord | None"]

_FINDERS: dict[Kind, _Finder] = {
    "latest": lambda records, _: _newest(records),
    "backup": lambda records, _: records[-2] if len(records) > 1 else None,
    "best": lambda records, s: next(iter(best_first(records, s.rule or rule_of(records))), None),
    "epoch": lambda records, s: _newest([r for r in records if closes_epoch(r) and r.epoch == s.number]),
    "step": lambda records, s: _newest([r for r in records if r.step == s.number]),
    "id": lambda records, s: _newest([r for r in records if r.id == s.text]),
    "path": _find_path,
}
"""Each receives the records oldest first, so that the newest of several wins."""
