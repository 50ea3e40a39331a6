"""`merge`: the weighted average of several checkpoints' model weights, as a new checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.checkpoint_parts import contents_of
from engine.convert.publish import Draft, publish
from engine.convert.tensors import Progress, ignore_progress, is_float, same_bytes
from engine.directory.record import CheckpointRecord
from engine.errors import ConfigError, StateMismatchError
from engine.format.manifest import TensorInfo
from engine.storage.base import Storage

_SHAPE_KEYS = ("model", "n_head")
"""Settings that change what the weights compute but not their shapes."""


def merge_checkpoints(
    sources: Sequence[tuple[Storage, str]],
    target: Storage,
    *,
    weights: Sequence[float] | None = None,
    on_total: Callable[[int], None] = ignore_progress,
    progress: Progress = ignore_progress,
) -> CheckpointRecord:
    """Average the modules of committed checkpoints and commit the result in `target`, with its parents.

    Args:
        sources: (storage, checkpoint name) pairs, at least two.
        weights: one per source, 0 or more; only their ratios matter. None: equal weights.
        on_total: called with the number of bytes to read.
    Raises: ConfigError for invalid weights; StateMismatchError with every difference between the
        architectures; DamagedError; DirectoryHeldError; StorageError. Then nothing is committed.
    """
    shares = shares_of(weights, len(sources))
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(CheckpointTensors(storage, name)) for storage, name in sources]
        tensors = common_tensors(opened)
        on_total(sum(info.tensor_bytes for info in tensors.values()))
        newest = max(opened, key=lambda source: source.manifest.step).manifest
        draft = Draft(
            reason="merge",
            step=newest.step,
            epoch=newest.epoch,
            tokens=newest.tokens,
            tensors=tensors,
            aliases={alias: name for alias, name in opened[0].manifest.aliases.items() if name in tensors},
            windows=lambda name: averaged(opened, shares, name),
            config=opened[0].manifest.config,
            parents=tuple(source.manifest.id for source in opened),
        )
        return publish(target, draft, progress)


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights, scaled to a sum of 1. ConfigError for a wrong number, negative ones, only zeros. Pure."""
    if count < 2:
        raise ConfigError(f"a merge needs at least two checkpoints, but got {count}")
    given = list(weights) if weights is not None else [1.0] * count
    if len(given) != count:
        raise ConfigError(f"--weights has {len(given)} weights for {count} checkpoints: give one for each")
    total = sum(given)
    if any(not math.isfinite(weight) or weight < 0 for weight in given) or not 0 < total < math.inf:
        shown = ",".join(f"{weight:g}" for weight in given)
        raise ConfigError(f"--weights {shown}: weights must be 0 or more, and not all 0")
    return [weight / total for weight in given]


def common_tensors(opened: Sequence[CheckpointTensors]) -> dict[str, TensorInfo]:
    """The modules' tensors, which must be the same in all. StateMismatchError with every difference."""
    first = opened[0]
    wanted = _module_tensors(first)
    lines = []
    if not wanted:
        raise StateMismatchError(f"{first.uri} holds no model: there is nothing to average")
    for other in opened[1:]:
        lines += [f"{other.name}: {line}" for line in _differences(wanted, _module_tensors(other))]
        lines += _config_differences(first, other)
        if dict(first.manifest.aliases) != dict(other.manifest.aliases):
            lines.append(f"{other.name}: its tied tensors differ from those of {first.name}")
    if lines:
        raise StateMismatchError(
            "these checkpoints have different architectures and cannot be averaged; compared with "
            f"{first.name}: " + "; ".join(lines)
        )
    return wanted


def averaged(
    opened: Sequence[CheckpointTensors], shares: Sequence[float], name: str
) -> Iterator[torch.Tensor]:
    """The weighted average of a tensor, in windows. Other than floating-point values come from the first."""
    if not is_float(opened[0].infos[name].dtype):
        yield from opened[0].windows(name)
        return
    for windows in zip(*(source.windows(name) for source in opened), strict=True):
        dtype = windows[0].dtype
        if all(same_bytes(window, windows[0]) for window in windows[1:]):
            yield windows[0]  # exact, however the weights are rounded
            continue
        # In float64, so that only the result is rounded.
        total = windows[0].double() * shares[0]
        for window, share in zip(windows[1:], shares[1:], strict=True):
            total.add_(window.double(), alpha=share)
        yield total.to(dtype)


def _module_tensors(source: CheckpointTensors) -> dict[str, TensorInfo]:
    modules = contents_of(source.manifest).modules
    stored = dict.fromkeys(name for names in modules.values() for name in names.values())
    return {name: source.infos[name] for name in stored}


def _differences(wanted: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> list[str]:
    lines = []
    for name in sorted({*wanted, *found}):
        if name not in found:
            lines.append(f"lacks {name}")
        elif name not in wanted:
            lines.append(f"also has {name}")
        elif wanted[name] != found[name]:
            lines.append(f"{name} is {_shown(found[name])}, not {_shown(wanted[name])}")
    return lines


def _config_differences(first: CheckpointTensors, other: CheckpointTensors) -> list[str]:
    pairs = [(key, first.manifest.config.get(key), other.manifest.config.get(key)) for key in _SHAPE_KEYS]
    return [
        f"{other.name}: its {key} is {theirs!r}, not {ours!r}"
        for key, ours, theirs in pairs
        if ours is not None and theirs is not None and ours != theirs
    ]


def _shown(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"
