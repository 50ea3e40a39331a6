"""Match a checkpoint's tensors with the live ones; all differences in one report, before any read. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.format.manifest import TensorInfo

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Match:
    """How saved tensors match live ones.

    matched: live name -> saved name. missing: live, not saved. unexpected: saved, not live.
    mismatched: one sentence for each tensor that is in both but differs.
    grown: live name -> saved name of the mismatched tensors that only have more rows here than when saved.
    """

    matched: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    grown: Mapping[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return not (self.missing or self.unexpected or self.mismatched)

    def with_more(self, other: Match) -> Match:
        """Both together."""
        return Match(
            {**self.matched, **other.matched},
            (*self.missing, *other.missing),
            (*self.unexpected, *other.unexpected),
            (*self.mismatched, *other.mismatched),
            {**self.grown, **other.grown},
        )


def match_tensors(
    live: Mapping[str, TensorInfo],
    live_aliases: Mapping[str, str],
    saved: Mapping[str, TensorInfo],
    saved_aliases: Mapping[str, str],
) -> Match:
    """Match by name; a tensor with several names (tied weights) matches under any of them.

    Weights that were tied when saved and are not tied here match the same saved tensor.
    """
    names: dict[str, list[str]] = {name: [name] for name in live}
    for alias, name in live_aliases.items():
        names[name].append(alias)
    matched: dict[str, str] = {}
    grown: dict[str, str] = {}
    missing, mismatched = [], []
    used = set()
    for name, candidates in names.items():
        found = next((saved_aliases.get(c, c) for c in candidates if saved_aliases.get(c, c) in saved), None)
        if found is None:
            missing.append(name)
            continue
        used.add(found)
        if saved[found] != live[name]:
            mismatched.append(f"{name}: saved as {describe(saved[found])}, here {describe(live[name])}")
            if has_grown(saved[found], live[name]):
                grown[name] = found
        else:
            matched[name] = found
    unexpected = tuple(name for name in saved if name not in used)
    return Match(matched, tuple(missing), unexpected, tuple(mismatched), grown)


def report(match: Match, what: str) -> str:
    """The error message with every difference: the first of each kind in full."""
    parts = [f"{what} does not fit the state; nothing was changed"]
    parts += differences(match)
    parts.append("Build what the saved run had, leave parts out with exclude=, or choose another checkpoint")
    return "\n".join(parts)


def summary(match: Match, what: str) -> str:
    """The warning of a restore that loaded what matches: a table of everything that did not."""
    head = f"from {what}: {len(match.matched)} tensors loaded, {len(match.grown)} filled in part"
    rows = [(title, line) for title, lines in _kinds(match) for line in lines]
    width = max((len(title) for title, _ in rows), default=0)
    return "\n".join([head, *(f"  {title:{width}}  {line}" for title, line in rows)])


def _kinds(match: Match) -> tuple[tuple[str, Sequence[str]], ...]:
    return (
        ("different", match.mismatched),
        ("missing in the checkpoint", match.missing),
        ("not in the state", match.unexpected),
    )


def differences(match: Match) -> list[str]:
    """A paragraph for each kind of difference."""
    parts = []
    for title, lines in _kinds(match):
        if lines:
            parts.append(f"  {title} ({len(lines)}):\n" + _lines(lines))
    return parts


def _lines(lines: Sequence[str]) -> str:
    shown = [f"    {line}" for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"    … and {len(lines) - _SHOWN} more")
    return "\n".join(shown)


def has_grown(saved: TensorInfo, live: TensorInfo) -> bool:
    """Whether a tensor only has more rows than when it was saved."""
    same_rows = saved.dtype == live.dtype and len(saved.shape) == len(live.shape) > 0
    return same_rows and saved.shape[1:] == live.shape[1:] and saved.shape[0] < live.shape[0]


def describe(info: TensorInfo) -> str:
    """Dtype and shape, for messages."""
    return f"{info.dtype} {list(info.shape)}"
